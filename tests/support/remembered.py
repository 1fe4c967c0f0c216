"""What follows from configs of networks alone is computed once for each: building one takes long, whatever its size.

A result that depended on anything else, such as weights, would be that of another network. So only functions of configs
are remembered, and not in the tests that are about them.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from torch import nn

from pipeline.evaluation import measure, pair, training_cost

Result = TypeVar("Result")


def remembered(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function, called once for each set of configs, which are dictionaries or those of networks."""
    results: dict[str, Result] = {}

    def call(*arguments: Any) -> Result:
        name = repr([named(argument) for argument in arguments])
        if name not in results:
            results[name] = function(*arguments)
        return results[name]

    return call


def named(argument: Any) -> Any:
    """The argument without what tells equal networks apart: their weights, and the folders that they come from."""
    config = dict(argument.config) if isinstance(argument, nn.Module) else argument
    if isinstance(config, dict):
        return {key: value for key, value in config.items() if not str(key).startswith("_")}
    return config


UNET_MACS, LEVELS_OF = remembered(measure.unet_macs), remembered(pair.levels_of)


def remember_evaluations(patch: pytest.MonkeyPatch) -> None:
    """For commands that count a network's arithmetic or find the level of a student."""
    patch.setattr(measure, "unet_macs", UNET_MACS)
    patch.setattr(training_cost, "unet_macs", UNET_MACS)
    patch.setattr(pair, "levels_of", LEVELS_OF)
