"""The ViT against timm's: names, shapes, numbers; weights from a file, and what is wrong with a file."""

import pytest
import torch
from safetensors.torch import save_file

from fedsim.errors import ConfigError, DataError
from fedsim.models import build_model
from fedsim.models.weights import fit, load_weights, resample_positions
from tests.oracles import timm_module, timm_vits

IMAGENET = {"vit-tiny": 5_717_416, "vit-small": 22_050_664, "vit-base": 86_567_656}  # timm's counts at 1000 classes


def tiny(classes: int = 10, size: int = 12) -> torch.nn.Module:
    return build_model("vit-tiny-32", classes=classes, shape=(3, size, size))


def test_timms_weights_give_timms_logits():
    torch.manual_seed(0)
    theirs = timm_vits().vit_tiny_patch16_224(num_classes=7).eval()
    with torch.no_grad():
        for value in theirs.parameters():
            value.add_(0.05 * torch.randn_like(value))  # its initialization has zeros and ones that hide mistakes
    ours = build_model("vit-tiny", classes=7, shape=(3, 224, 224))
    state = theirs.state_dict()
    assert {n: v.shape for n, v in state.items()} == {n: v.shape for n, v in ours.state_dict().items()}
    ours.load_state_dict(fit(state, ours))
    x = torch.randn(3, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", IMAGENET)
def test_parameter_counts_at_imagenets_size(name):
    with torch.device("meta"):
        model = build_model(name, classes=1000, shape=(3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == IMAGENET[name]


@pytest.mark.parametrize("grid", [(7, 7), (14, 14), (5, 9), (20, 20)])
def test_positions_are_resampled_as_timm_does(grid):
    torch.manual_seed(0)
    positions = torch.randn(1, 1 + 14 * 14, 8)
    theirs = timm_module("layers.pos_embed").resample_abs_pos_embed(positions, list(grid))
    torch.testing.assert_close(resample_positions(positions, grid), theirs)


def test_another_grid_and_other_classes_are_fitted(tmp_path):
    source, target = tiny(classes=10, size=32), tiny(classes=4, size=12)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    head = target.head.weight.clone()
    load_weights(target, tmp_path / "w.safetensors")
    torch.testing.assert_close(target.blocks[3].mlp.fc2.weight, source.blocks[3].mlp.fc2.weight)
    torch.testing.assert_close(target.pos_embed, resample_positions(source.pos_embed, (3, 3)))
    assert torch.equal(target.head.weight, head)


def test_any_model_of_ours_is_restored_classifier_and_statistics_included(tmp_path):
    torch.manual_seed(0)
    source, target = (build_model("small-cnn", classes=4, shape=(3, 12, 12)) for _ in range(2))
    source(torch.randn(8, 3, 12, 12))
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert all(torch.equal(v, target.state_dict()[n]) for n, v in source.state_dict().items())


def test_what_is_wrong_with_a_file_is_said_at_once(tmp_path):
    state = tiny().state_dict()
    del state["blocks.0.norm1.weight"]
    state |= {"extra": torch.zeros(1), "norm.bias": torch.zeros(5)}
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    with pytest.raises(DataError) as caught:
        load_weights(tiny(), path)
    text = str(caught.value)
    assert "1 missing: blocks.0.norm1.weight" in text
    assert "1 unexpected: extra" in text
    assert "norm.bias (expected (96,), found (5,))" in text
    path.write_bytes(b"not tensors")
    with pytest.raises(DataError, match="not a safetensors file"):
        load_weights(tiny(), path)
    with pytest.raises(DataError, match="cannot be read"):
        load_weights(tiny(), tmp_path / "absent.safetensors")
    save_file({**tiny().state_dict(), "pos_embed": torch.zeros(1, 8, 96)}, path)
    with pytest.raises(DataError, match="7 patch positions are not a square grid"):
        load_weights(tiny(), path)


def test_images_that_patches_do_not_tile_are_refused():
    with pytest.raises(ConfigError, match="multiple of 16"):
        build_model("vit-tiny", classes=10, shape=(3, 28, 28))
