"""The scores of images against closed forms, torchmetrics and transformers; and the remedy where one is missing."""

import math
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.tiny import tiny_pipeline
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from pipeline.evaluation.quality import (
    Missing,
    Statistics,
    center_square,
    check_tensors_only,
    clip_score,
    frechet_distance,
    inception_features,
    inception_score,
    load_clip,
    load_inception,
    missing_torchmetrics,
    open_reference,
    read_batches,
)
from pipeline.system.errors import UserError
from pipeline.system.extras import install_command

CPU = torch.device("cpu")


def gaussian(count, width, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def torchmetrics_fid(reference, features):
    identity = torch.nn.Identity()
    identity.num_features = features.shape[1]
    metric = FrechetInceptionDistance(identity)
    metric.update(reference, real=True)
    metric.update(features, real=False)
    return metric.compute().item()


@pytest.mark.parametrize("count", [100, 20])
def test_the_distance_matches_torchmetrics(count):
    """Also with fewer images than features, where the covariances are singular."""
    mix = gaussian(32, 32, seed=1)
    reference, features = gaussian(150, 32, seed=2), gaussian(count, 32, seed=3) @ mix + gaussian(1, 32, seed=4)
    assert frechet_distance(reference, features) == pytest.approx(torchmetrics_fid(reference, features), rel=1e-6)


def test_features_have_no_distance_to_themselves():
    features = gaussian(200, 8)
    assert abs(frechet_distance(features, features)) < 1e-6


def test_the_distance_of_gaussians_is_the_closed_form():
    """Between N(m, s^2) and N(m', s'^2) in independent directions: the sum of (m - m')^2 + (s - s')^2."""
    shift, scale = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 0.5, 3.0])
    expected = (shift.square() + (scale - 1).square()).sum().item()
    features = gaussian(200_000, 4, seed=1) * scale + shift
    assert frechet_distance(gaussian(200_000, 4), features) == pytest.approx(expected, rel=0.02)
    stored = Statistics(torch.zeros(4).double(), torch.eye(4).double())
    assert frechet_distance(stored, features) == pytest.approx(expected, rel=0.02)


def test_the_distance_of_correlated_gaussians_is_the_closed_form():
    """Between N(0, S) and N(m, c^2 S): |m|^2 + (c - 1)^2 tr(S)."""
    mix = gaussian(6, 6, seed=1)
    features = gaussian(300, 6) @ mix
    expected = 6 * 2.0**2 + (3 - 1) ** 2 * torch.cov(features.T).trace().item()
    scaled = 3 * features - 2 * features.mean(dim=0) + 2
    assert frechet_distance(features, scaled) == pytest.approx(expected, rel=1e-6)


def test_stored_statistics_stand_for_the_features_that_they_are_of():
    reference, features = gaussian(300, 6), gaussian(100, 6, seed=1) * 1.5 + 100
    stored = Statistics(reference.mean(dim=0), torch.from_numpy(np.cov(reference.numpy(), rowvar=False)))
    assert frechet_distance(stored, features) == pytest.approx(frechet_distance(reference, features), rel=1e-9)


def test_statistics_of_other_features_are_refused():
    stored = Statistics(torch.zeros(5).double(), torch.eye(5).double())
    with pytest.raises(UserError, match="statistics of 5 features, but Inception has 4"):
        frechet_distance(stored, gaussian(10, 4))


def test_the_inception_score_is_1_without_any_class_and_the_number_of_certain_classes():
    assert inception_score(torch.zeros(100, 7)) == pytest.approx(1.0)
    assert inception_score(500 * torch.eye(4).repeat(500, 1)) == pytest.approx(4.0, rel=0.02)


def test_the_inception_score_is_reproducible_and_leaves_the_global_generator_alone():
    logits = gaussian(95, 5).float() * 3
    torch.manual_seed(1)
    first, drawn = inception_score(logits), torch.rand(1)
    torch.manual_seed(1)
    assert drawn == torch.rand(1)
    assert inception_score(logits) == first


def test_features_are_in_the_order_of_the_images(tmp_path):
    files = write_images(tmp_path, 5)
    inception = lambda batch: (batch.float().mean(dim=(2, 3)), batch.float().flatten(1)[:, :2])  # noqa: E731
    features, logits = inception_features(read_batches(files, 8, "box", 2), inception, 5, "images")
    expected = [np.asarray(Image.open(file).resize((8, 8), Image.Resampling.BOX), float).mean((0, 1)) for file in files]
    np.testing.assert_allclose(features, expected, atol=1e-4)
    assert logits.shape == (5, 2)
    assert features.dtype == torch.float64


def write_images(folder, count, size=(16, 16)):
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(2)
    for i in range(count):
        Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("name", ["bicubic", "lanczos", "bilinear"])
def test_images_are_resized_with_the_named_filter(name):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    expected = image.resize((32, 32), Image.Resampling[name.upper()])
    assert np.array_equal(np.asarray(center_square(image, 32, name)), np.asarray(expected))


def test_a_long_image_is_cropped_to_its_centre():
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    assert center_square(image, 50, "nearest").getcolors() == [(2500, (0, 0, 255))]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP in miniature."""
    tokenizer = tiny_pipeline().tokenizer
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(4)
    model = CLIPModel(
        CLIPConfig(
            text_config={**layers, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 8},
            vision_config={**layers, "image_size": 32, "patch_size": 16},
            projection_dim=8,
        )
    )
    crop = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    CLIPProcessor(image_processor=crop, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_the_clip_score_matches_transformers(clip_folder, tmp_path):
    """Also for a prompt longer than CLIP takes: truncation keeps the end token, from which CLIP takes the embedding."""
    files, prompts = write_images(tmp_path, 3, (48, 48)), ["a cat", "dogs", "many long words indeed"]
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    images = [Image.open(file) for file in files]
    inputs = processor(text=prompts, images=images, return_tensors="pt", padding=True, truncation=True, max_length=8)
    with torch.no_grad():
        outputs = model(**inputs)
    cosines = (outputs.image_embeds * outputs.text_embeds).sum(dim=1)
    expected = 100 * cosines.mean().item()
    # torchmetrics clips negative scores to 0, so the model is negated if its score is negative.
    sign = math.copysign(1, expected)
    clip = load_clip(clip_folder, CPU)
    with torch.no_grad():
        clip._model.visual_projection.weight.mul_(sign)
    found = clip_score(read_batches(files, 48, "bicubic", 2), prompts, clip, CPU, "images")
    assert found == pytest.approx(abs(expected), rel=1e-4)
    assert found > 0


def test_what_is_missing_is_named_with_the_remedy(monkeypatch):
    assert load_clip(None, CPU).reason.startswith("needs --clip FOLDER, a CLIP model saved by transformers")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    assert missing_torchmetrics() == Missing(f"needs torchmetrics; {install_command('evaluate')}")
    assert load_inception(None, CPU) == Missing(f"needs torch-fidelity and torchvision; {install_command('evaluate')}")


def fidelity_module(monkeypatch, failure=None):
    """Replaces torch-fidelity's module; returns the list of its extractor's arguments."""
    calls = []

    class FeatureExtractorInceptionV3(torch.nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path=None):
            super().__init__()
            calls.append((name, features_list, feature_extractor_weights_path))
            if failure:
                raise failure

        def forward(self, images):
            return images.float().mean(dim=(2, 3)), images[:, :, 0, 0].float()

    name = "torch_fidelity.feature_extractor_inceptionv3"
    module = types.ModuleType(name)
    module.FeatureExtractorInceptionV3 = FeatureExtractorInceptionV3
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_inception_takes_its_weights_from_a_file(monkeypatch, tmp_path):
    torch.save({"weights": torch.ones(3)}, tmp_path / "inception.pth")
    calls = fidelity_module(monkeypatch)
    features, logits = load_inception(tmp_path / "inception.pth", CPU)(torch.full((2, 3, 8, 8), 9, dtype=torch.uint8))
    assert calls == [("inception-v3-compat", ["2048", "logits_unbiased"], str(tmp_path / "inception.pth"))]
    assert torch.equal(features, torch.full((2, 3), 9.0))
    assert logits.shape == (2, 3)


def test_weights_that_cannot_be_downloaded_are_missing_and_wrong_ones_are_refused(monkeypatch, tmp_path):
    fidelity_module(monkeypatch, OSError("no network"))
    assert "and pass it with --inception-weights" in load_inception(None, CPU).reason
    torch.save({"weights": torch.ones(3)}, tmp_path / "other.pth")
    fidelity_module(monkeypatch, RuntimeError("Missing keys: Conv2d_1a_3x3"))
    with pytest.raises(
        UserError, match=r"other.pth cannot be used \(Missing keys: Conv2d_1a_3x3\)\. Pass weights-inception.*"
    ):
        load_inception(tmp_path / "other.pth", CPU)


def test_a_folder_without_a_clip_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--clip .* cannot be loaded .*\. Pass a folder with a CLIP model and"):
        load_clip(tmp_path, CPU)


def test_weights_that_would_execute_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Image.new, ("RGB", (1, 1)))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    torch.save({"weights": Evil()}, tmp_path / "worse.pth")
    torch.save({"weights": torch.ones(3)}, tmp_path / "fine.pth")
    check_tensors_only(tmp_path / "fine.pth")
    for name in ("evil.pth", "worse.pth"):
        with pytest.raises(UserError, match=rf"{name} cannot be loaded"):
            check_tensors_only(tmp_path / name)


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_a_reference_may_be_stored_statistics(tmp_path, ending):
    mu, sigma = torch.arange(3.0), 2 * torch.eye(3)
    path = tmp_path / f"real.{ending}"
    if ending == "npz":
        np.savez(path, mu=mu.numpy(), sigma=sigma.numpy())
    else:
        save_file({"mu": mu, "sigma": sigma}, path)
    found = open_reference(path)
    assert torch.equal(found.mu, mu.double())
    assert torch.equal(found.sigma, sigma.double())


def test_a_reference_may_be_a_folder_of_images(tmp_path):
    files = write_images(tmp_path / "real" / "below", 3)
    (tmp_path / "real" / "readme.txt").write_text("not an image")
    assert open_reference(tmp_path / "real") == files


def bad_references(folder):
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("mu and sigma")
    np.savez(folder / "names.npz", mean=np.zeros(3), sigma=np.eye(3))
    np.savez(folder / "shapes.npz", mu=np.zeros(3), sigma=np.eye(4))
    np.savez(folder / "nan.npz", mu=np.full(3, np.nan), sigma=np.eye(3))
    np.savez(folder / "objects.npz", mu=np.array([{}], dtype=object), sigma=np.eye(3))
    np.save(folder / "plain.npy", np.zeros(3))
    (folder / "cut.safetensors").write_bytes(b"\x10\x00")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", r"holds 0 images\. Pass a folder with at least two"),
        ("notes.txt", "cannot be read"),
        ("names.npz", "cannot be read"),
        ("shapes.npz", r"has mu of shape \(3,\) and sigma of shape \(4, 4\)\. They must be finite and of shapes"),
        ("nan.npz", r"has mu .*\. They must be finite"),
        ("objects.npz", "cannot be read"),
        ("plain.npy", "cannot be read"),
        ("cut.safetensors", "cannot be read"),
    ],
)
def test_a_reference_of_another_kind_is_refused(tmp_path, name, message):
    bad_references(tmp_path)
    with pytest.raises(UserError, match=f"--reference .*{name} {message}"):
        open_reference(tmp_path / name)


def test_a_truncated_image_is_named(tmp_path):
    files = write_images(tmp_path, 2)
    files[1].write_bytes(files[1].read_bytes()[:50])
    with pytest.raises(UserError, match=r"001.png cannot be used .*\. Fix or remove the file"):
        list(read_batches(files, 8, "box", 4))
