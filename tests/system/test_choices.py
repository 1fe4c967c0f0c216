"""The choices of options, which import no library, are those of the tables behind them."""

from diffusers.optimization import SchedulerType

from pipeline.core import diffusion
from pipeline.core.losses import FEATURE_LOSSES
from pipeline.evaluation.quality import FILTERS
from pipeline.sampling.generate import SCHEDULERS
from pipeline.settings import distill, evaluate, training
from pipeline.system import options
from pipeline.system.device import DTYPES


def test_the_choices_are_those_of_the_tables():
    assert tuple(DTYPES) == options.DTYPE_NAMES
    assert options.PREDICTION_TYPES == diffusion.PREDICTION_TYPES
    assert tuple(SCHEDULERS) == options.SAMPLERS
    assert tuple(FEATURE_LOSSES) == distill.FEATURE_LOSSES
    assert tuple(s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT) == training.LR_SCHEDULERS
    assert set(evaluate.FILTERS) <= set(FILTERS)
