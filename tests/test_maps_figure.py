"""The picture of images with masks over them: what is on it and where."""
import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_transform, resolve_data_config

from ran_layers.images import image_transforms, to_rgb
from ran_layers.mask_figure import COLOURS, draw_masks, mask_columns, overlay, predict, top_classes

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("ran_att56_cifar.cifar10").eval()


def test_predictions_are_timms(model):
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 50, 3), np.uint8)) for i in range(18)]
    transform = create_transform(**resolve_data_config(model=model))
    with torch.no_grad():
        expected = model(torch.stack([transform(image) for image in images]))
    masks, logits = predict(model, images)  # more images than one batch
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert all(len(mask) == 18 for mask in masks.values())


@pytest.mark.parametrize("names", [NAMES[:3], dict(enumerate(NAMES[:3])), {str(i): NAMES[i] for i in range(3)}])
def test_classes_have_their_names(names):
    net = nn.Identity()
    net.pretrained_cfg = {"label_names": names}
    logits = torch.log(torch.tensor([[0.05, 0.7, 0.25], [0.8, 0.1, 0.1]]))
    (first, second), (third, _) = top_classes(net, logits, 2)
    assert (first[0], second[0], third[0]) == ("automobile", "bird", "airplane")
    assert first[1] == pytest.approx(0.7)
    assert top_classes(net, logits[:, :2], 1)[0][0][0] == "class 1"  # names of another classifier
    net.pretrained_cfg = {}
    assert top_classes(net, logits, 1)[0][0][0] == "class 1"
    net.num_classes = 0
    assert top_classes(net, logits, 1) == [[], []]


def test_columns_are_the_mean_and_the_channels_that_vary_most():
    mask = torch.full((2, 5, 4, 4), 0.5)
    mask[:, 3, :2] = 1  # varies most, the same in both images
    mask[:, 1, 0] = 0.6
    mask[0, 4] = 1  # differs between images, not between positions
    group = mask_columns("stage", mask, 2)
    assert [label for label, _ in group.columns] == ["mean", "channel 3", "channel 1"]
    torch.testing.assert_close(group.columns[0][1], mask.mean(1))
    torch.testing.assert_close(group.columns[1][1], mask[:, 3])
    assert len(mask_columns("stage", mask, 9).columns) == 6


def test_overlays_lie_where_the_mask_is():
    white = np.full((64, 64, 3), 255, np.uint8)
    mask = torch.zeros(4, 4)
    mask[0, 3] = 1
    shown = overlay(white, mask)
    assert shown[0, 63].tolist() == pytest.approx((COLOURS[-1] + 0.35 * (255 - COLOURS[-1])).tolist(), abs=1)
    assert shown[63, 0].tolist() == pytest.approx((COLOURS[0] + 0.35 * (255 - COLOURS[0])).tolist(), abs=1)
    brightness = shown.sum(axis=2).astype(int)
    assert (np.diff(brightness[0, 40:56]) > 0).all()  # bilinear: no steps between two values of the mask
    assert np.unique(overlay(white, torch.full((4, 4), 0.3))).size <= 3  # a flat mask has one colour


def test_the_picture_is_a_grid_of_images_and_masks(model):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    picture = np.asarray(draw_masks(model, [image] * 2, ["one", "two"], channels=1, tile=64))
    _, to_tile = image_transforms(model, 64)
    tile = to_tile(image)
    masks, _ = predict(model, [image] * 2)

    def places(block):
        windows = np.lib.stride_tricks.sliding_window_view(picture, block.shape)[:, :, 0]
        found = (windows[:, :, 0, 0] == block[0, 0]).all(-1) & (windows[:, :, -1, -1] == block[-1, -1]).all(-1)
        return [(y, x) for y, x in np.argwhere(found) if (windows[y, x] == block).all()]

    rows = places(tile)
    assert len(rows) == 2
    assert rows[0][1] == rows[1][1]  # one below the other
    groups = [mask_columns(name, mask, 1) for name, mask in masks.items()]
    found = [places(overlay(tile, maps[0])) for group in groups for _, maps in group.columns]
    assert [[y for y, _ in each] for each in found] == [[y for y, _ in rows]] * 6  # in the rows of the images
    assert [each[0][1] for each in found] == sorted(each[0][1] for each in found)  # from left to right


def test_a_network_of_features_has_masks_and_no_classes():
    features = timm.create_model("ran_att56_cifar", features_only=True)
    masks, outputs = predict(features, [Image.new("RGB", (32, 32))] * 3)
    assert len(masks) == 3
    assert top_classes(features, outputs, 1) == [[]] * 3


def test_many_modules_go_into_blocks():
    net = timm.create_model("ran_att128_cifar_orig", num_classes=0)
    picture = draw_masks(net, [Image.new("RGB", (32, 32))], tile=32, title="many")
    assert picture.width <= 13.5 * 32
    assert picture.height > 3 * 32  # three blocks


@pytest.mark.parametrize(("wrong", "message"), [
    (dict(images=[]), "images must hold at least one"), (dict(names=["a", "b"]), "names must have one entry per image"),
    (dict(channels=-1), "channels must be at least 0"), (dict(tile=8), "tile must be at least 32")])
def test_wrong_drawing_arguments_are_named(model, wrong, message):
    with pytest.raises(ValueError, match=message):
        draw_masks(model, **{"images": [Image.new("RGB", (32, 32))], **wrong})


@pytest.mark.parametrize("images", [Image.new("RGB", (32, 32)), [np.zeros((32, 32, 3))], iter([])],
                         ids=lambda images: type(images).__name__)
def test_what_is_no_sequence_of_pictures_is_named(model, images):
    with pytest.raises(TypeError, match="images must be a sequence of Pillow images, got "):
        draw_masks(model, images)


def test_names_that_are_none_are_named(model):
    with pytest.raises(TypeError, match=r"names must be strings, got \[3\]"):
        draw_masks(model, [Image.new("RGB", (32, 32))], [3])


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel], ids=["compiled", "parallel"])
def test_wrapped_networks_are_drawn_as_what_they_wrap(model, wrap):
    image = Image.new("RGB", (40, 30), "teal")
    assert draw_masks(wrap(model), [image]).tobytes() == draw_masks(model, [image]).tobytes()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_pictures_of_other_modes_are_drawn_as_in_rgb(model, mode):
    image = Image.new("RGB", (40, 30), "teal").convert("L")
    image = image if mode == "L" else image.convert(mode)
    assert draw_masks(model, [image]).tobytes() == draw_masks(model, [to_rgb(image)]).tobytes()


def test_models_of_other_inputs_are_refused():
    with pytest.raises(ValueError, match="1 or 3 channels, it takes 5"):
        draw_masks(timm.create_model("ran_att56_cifar_orig", in_chans=5), [Image.new("RGB", (32, 32))])
