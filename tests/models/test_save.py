"""What is handed on of a teacher: its own files, readable by transformers 4 and 5, and without paths."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import tiny_unet

from pipeline.models.bundled import TEACHER, TEACHER_XL
from pipeline.models.hashing import weights_sha256
from pipeline.models.load import load_base
from pipeline.models.save import copy_parts, save_base, save_pipeline
from pipeline.models.schedule import load_noise_scheduler

TEXT = "text_encoder/model.safetensors"
LAYER = [
    *(f"self_attn.{name}_proj.{kind}" for name in "qkv" for kind in ("weight", "bias")),
    *(f"{name}.{kind}" for name in ("self_attn.out_proj", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")),
    *(f"layer_norm{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias")),
]


def names_of_transformers_4(layers):
    """The tensors of a CLIPTextModel, as in the checkpoints of Stable Diffusion 1.5."""
    embeddings = ["embeddings.token_embedding.weight", "embeddings.position_embedding.weight"]
    norm = ["final_layer_norm.weight", "final_layer_norm.bias"]
    encoder = [f"encoder.layers.{layer}.{name}" for layer in range(layers) for name in LAYER]
    return {f"text_model.{name}" for name in (*embeddings, *encoder, *norm)}


def base_of(folder, out, variant=None, prediction_type=None):
    save_base(folder, variant, load_noise_scheduler(folder, prediction_type), out)
    return out


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def model(teacher, tmp_path):
    return shutil.copytree(teacher, tmp_path / "model")


@pytest.mark.parametrize("layers", [1])
def test_transformers_4_knows_every_tensor_of_a_base_and_of_a_student(teacher, tmp_path, layers):
    base = base_of(teacher, tmp_path / "base")
    save_pipeline(base, tiny_unet(), tmp_path / "student")
    # Bases of earlier versions have the names of transformers 5.
    save_pipeline(teacher, tiny_unet(), tmp_path / "other")
    for folder in (base, tmp_path / "student", tmp_path / "other"):
        assert set(load_file(folder / TEXT)) == names_of_transformers_4(layers)
        assert weights_sha256(load_base(folder).text_encoder) == weights_sha256(load_base(teacher).text_encoder)


@pytest.mark.parametrize(("folder", "layers"), [(TEACHER, 3), (TEACHER_XL, 4)])
def test_transformers_4_knows_every_tensor_of_the_demo_teachers(folder, layers):
    assert set(load_file(folder / TEXT)) == names_of_transformers_4(layers)


@pytest.mark.parametrize("source", ["teacher", "demo"])
def test_a_tokenizer_has_the_vocabulary_files_of_transformers_4(teacher, tmp_path, source):
    """vocab.json and merges.txt hold what tokenizer.json does."""
    folder = base_of(TEACHER if source == "demo" else teacher, tmp_path / "base") / "tokenizer"
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    assert json.loads((folder / "vocab.json").read_text()) == model["vocab"]
    merges = (folder / "merges.txt").read_text().splitlines()
    assert merges[0].startswith("#version")
    assert merges[1:] == [" ".join(pair) for pair in model["merges"]]


def test_a_base_is_the_teachers_own_files(teacher, tmp_path):
    """Once they are what transformers 4 reads, they are copied to the byte."""
    first, second = base_of(teacher, tmp_path / "first"), tmp_path / "second"
    (first / "unet").mkdir()
    assert files_in(base_of(first, second)) == files_in(first)


def test_a_base_does_not_depend_on_where_the_teacher_lies(teacher, tmp_path):
    places = [shutil.copytree(teacher, tmp_path / name / "model") for name in ("here", "there")]
    for place in places:
        for path in ("model_index.json", "vae/config.json", "text_encoder/config.json"):
            config = json.loads((place / path).read_text())
            (place / path).write_text(json.dumps({**config, "_name_or_path": str(place)}))
        tokenizer = place / "tokenizer/tokenizer_config.json"
        state = {"name_or_path": str(place), "special_tokens_map_file": str(place / "map.json")}
        tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), **state}))
    here, there = (files_in(base_of(place, place.parent / "base")) for place in places)
    assert here == there
    assert not [name for name, content in here.items() if str(tmp_path).encode() in content]


def test_half_precision_becomes_float32_under_the_plain_names(model, tmp_path):
    expected = {}
    for path in (TEXT, "vae/diffusion_pytorch_model.safetensors"):
        half = {name: tensor.half() for name, tensor in load_file(model / path).items()}
        save_file(half, (model / path).with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        (model / path).unlink()
        expected[path] = {name.removeprefix("text_model."): tensor.float() for name, tensor in half.items()}
    base = base_of(model, tmp_path / "base")
    for path, tensors in expected.items():
        found = {name.removeprefix("text_model."): tensor for name, tensor in load_file(base / path).items()}
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert json.loads((base / "text_encoder/config.json").read_text())["dtype"] == "float32"


def test_a_pickle_becomes_safetensors(model, tmp_path):
    weights = load_file(model / TEXT)
    (model / TEXT).unlink()
    torch.save(weights, model / "text_encoder/pytorch_model.bin")
    assert set(load_file(base_of(model, tmp_path / "base") / TEXT)) == names_of_transformers_4(1)


def test_weights_in_pieces_stay_in_pieces(model, tmp_path):
    weights = load_file(model / "vae/diffusion_pytorch_model.safetensors")
    pieces = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    owner = {name: pieces[i % 2] for i, name in enumerate(weights)}
    for piece in pieces:
        part = {name: tensor for name, tensor in weights.items() if owner[name] == piece}
        save_file(part, model / "vae" / piece, metadata={"format": "pt"})
    (model / "vae/diffusion_pytorch_model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": owner}
    (model / "vae/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    base = base_of(model, tmp_path / "base")
    assert all((base / "vae" / piece).is_file() for piece in pieces)
    assert weights_sha256(load_base(base).vae) == weights_sha256(load_base(model).vae)


def test_a_complete_safety_checker_is_handed_on_and_others_are_not(model, tmp_path):
    index = json.loads((model / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    (model / "model_index.json").write_text(json.dumps(index))
    for part, file in (("safety_checker", "config.json"), ("feature_extractor", "preprocessor_config.json")):
        (model / part).mkdir()
        (model / part / file).write_text("{}")
    bare = json.loads((base_of(model, tmp_path / "without") / "model_index.json").read_text())
    assert bare["safety_checker"] == [None, None]
    assert bare["requires_safety_checker"] is False
    save_file({"w": torch.ones(2)}, model / "safety_checker/model.safetensors")
    base = base_of(model, tmp_path / "with")
    save_pipeline(base, tiny_unet(), tmp_path / "student")
    for folder in (base, tmp_path / "student"):
        assert json.loads((folder / "model_index.json").read_text())["safety_checker"] == index["safety_checker"]
        assert (folder / "safety_checker/model.safetensors").is_file()


def test_the_sampling_scheduler_has_the_prediction_type_that_was_asked_for(teacher, tmp_path):
    path = "scheduler/scheduler_config.json"
    same = base_of(teacher, tmp_path / "same", prediction_type="epsilon")
    assert (same / path).read_bytes() == (teacher / path).read_bytes()
    other = json.loads((base_of(teacher, tmp_path / "other", prediction_type="v_prediction") / path).read_text())
    assert other == {**json.loads((teacher / path).read_text()), "prediction_type": "v_prediction"}


def test_parts_are_written_in_the_precision_that_is_asked_for(teacher, tmp_path):
    (tmp_path / "half").mkdir()
    copy_parts(teacher, None, tmp_path / "half", torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / TEXT).values()} == {torch.float16}
