"""The networks: their sizes against the papers' tables, and timm's whole model interface for every registered name."""
import copy
import math

import pytest
import timm
import torch
import torch.nn as nn
from safetensors.torch import save_file
from timm.layers import set_scriptable
from timm.models import get_notrace_functions, get_notrace_modules, group_parameters
from timm.optim import create_optimizer_v2
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from ran_layers import AttentionModule
from ran_layers.models import ResidualAttentionNet

NAMES = [*timm.list_models("ran_*"), "plain_cnn8_cifar"]
# One of each family, for what differs by the network class rather than by its width and depth.
SMALL = ["ran_att56_cifar", "ran_att56_cifar_orig", "plain_cnn8_cifar"]

# Parameters: exact, or in millions to the rounding of the tables. GMACs at 224 px.
SIZES = {
    "ran_att56": (31_810_728, 6.27),
    "ran_att92": (52_466_344, 10.53),
    "ran_attnext56": (31_318_824, 6.42),
    "ran_att56_cifar": (1.88, None),
    "ran_att92_cifar": (2.69, None),
    "ran_att56_cifar_orig": (1.03, None),
    "ran_att92_cifar_orig": (1.84, None),
    "ran_att128_cifar_orig": (2.65, None),
    "ran_att164_cifar_orig": (3.46, None),
    "ran_att236_cifar_orig": (5.08, None),
    "ran_att452_cifar_orig": (10.2, None),
}


@pytest.fixture(scope="module", params=NAMES)
def network(request):
    """Each registered network by itself, in evaluation mode; a test that changes it takes a copy."""
    torch.manual_seed(0)
    return timm.create_model(request.param).eval()


def name_of(model):
    return model.pretrained_cfg["architecture"]


def images(model, size=None):
    channels, height, width = model.pretrained_cfg["input_size"]
    return torch.randn(2, channels, *(size or (height, width)))


@pytest.mark.parametrize("name", NAMES)
def test_parameters(name):
    model = timm.create_model(name, device="meta", dtype=torch.float64)
    model.reset_classifier(model.num_classes)
    tensors = [tensor for key, tensor in model.state_dict().items() if not key.endswith("num_batches_tracked")]
    assert {(tensor.device.type, tensor.dtype) for tensor in tensors} == {("meta", torch.float64)}
    if name in SIZES:
        expected, count = SIZES[name][0], sum(p.numel() for p in model.parameters())
        decimals = len(str(expected).partition(".")[2])
        assert expected == (count if isinstance(expected, int) else round(count / 1e6, decimals))


@pytest.mark.parametrize("name", [name for name, (_, gmacs) in SIZES.items() if gmacs])
def test_gmacs(name):
    model = timm.create_model(name, device="meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert round(counter.get_total_flops() / 2e9, 2) == SIZES[name][1]


def test_names():
    assert set(SIZES) < set(NAMES)
    assert {"ran_att56_cifar.cifar10", "ran_att56_cifar.cifar100", "ran_att56.untrained"} < set(
        timm.list_models("ran_*", include_tags=True))
    pretrained = [name for name in timm.list_pretrained() if name.partition(".")[0] in NAMES]
    assert len(pretrained) >= 4
    assert all(timm.models.get_pretrained_cfg(name).file for name in pretrained)


@pytest.mark.parametrize("tagged", timm.list_models(["ran_*", "plain_cnn8*"], include_tags=True))
def test_mean_and_std(tagged):
    cfg = timm.models.get_pretrained_cfg(tagged)
    classes, mean, std = {
        "cifar10": (10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        "cifar100": (100, (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
        "untrained": (1000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    }[cfg.tag]
    assert cfg.num_classes == classes
    assert_close(torch.tensor([cfg.mean, cfg.std]), torch.tensor([mean, std]), rtol=0, atol=6e-5)


def test_the_tag_sets_the_classes():
    assert timm.create_model("ran_att56_cifar.cifar100").get_classifier().out_features == 100


@torch.no_grad()
def test_pretrained_cfg(network):
    cfg, state = network.pretrained_cfg, network.state_dict()
    assert state[cfg["first_conv"] + ".weight"].shape[1] == cfg["input_size"][0] == network.in_chans == 3
    assert state[cfg["classifier"] + ".weight"].shape == (cfg["num_classes"], network.num_features)
    assert network.forward_features(images(network)).shape == (2, network.num_features, *cfg["pool_size"])
    side, least = (32, 16) if "cifar" in name_of(network) else (224, 64)
    assert (cfg["input_size"], cfg["min_input_size"]) == ((3, side, side), (3, least, least))
    for size in [(least, least), (least + 5, least + 12)]:
        assert network(images(network, size)).shape == (2, network.num_classes)


def test_trunk_depth_is_in_the_name(network):
    name = name_of(network)
    if name.endswith("_cifar_orig") and "452" not in name:  # 36 m + 20 holds for t = 2
        weighted = [n for n, layer in network.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))
                    and ".mask." not in n and "downsample" not in n]
        assert name == f"ran_att{len(weighted)}_cifar_orig"


@torch.no_grad()
def test_head(network):
    x = images(network, network.pretrained_cfg["min_input_size"][1:])
    features = network.forward_features(x)
    assert network.get_classifier() is network.get_submodule(network.pretrained_cfg["classifier"])
    assert_close(network.forward_head(features), network(x))
    model = copy.deepcopy(network)
    pooled = (2, model.num_features)
    assert model.forward_head(features, pre_logits=True).shape == pooled == (2, model.head_hidden_size)
    assert_close(model.get_classifier()(model.forward_head(features, pre_logits=True)), model.forward_head(features))
    model.reset_classifier(7, "max")
    assert (model.forward_head(features).shape, model.num_classes) == ((2, 7), 7)
    model.reset_classifier(0)
    assert (model.forward_head(features).shape, model.num_classes) == (pooled, 0)
    assert_close(model.forward_head(features), features.amax((2, 3)))
    model.reset_classifier(0, "")
    assert torch.equal(model.forward_head(features), features)
    model.reset_classifier(5, "catavgmax")
    assert model.forward_head(features).shape == (2, 5)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size) == (2, 2 * pooled[1])
    model = timm.create_model(name_of(network), num_classes=0, global_pool="", in_chans=1).eval()
    assert model(x[:, :1]).shape == features.shape


@torch.no_grad()
def test_feature_pyramid(network):
    size = (65, 70)
    x = images(network, size)
    maps = network.forward_intermediates(x, intermediates_only=True)
    model = timm.create_model(name_of(network), features_only=True).eval()
    info = model.feature_info
    assert len(info) >= 4
    assert [y.shape for y in model(x)] == [y.shape for y in maps]
    assert info.channels() == [y.shape[1] for y in maps]
    for y, reduction in zip(maps, info.reduction()):
        # The plain network's pooling without padding rounds down, all else up.
        rounded = math.floor if name_of(network).startswith("plain") else math.ceil
        assert y.shape[2:] == tuple(rounded(n / reduction) for n in size)


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("feature_cls", ["list", "getter", "hook", "fx"])
def test_kinds_of_feature_pyramids(name, feature_cls):
    source = timm.create_model(name).eval()
    model = timm.create_model(name, features_only=True, feature_cls=feature_cls, out_indices=(1, 3)).eval()
    state = source.state_dict()
    state.update({key.replace(".", "_", 1): value for key, value in state.items()})  # "list" and "hook" flatten
    model.load_state_dict({
        key: state[key.removeprefix("model.").removeprefix("graph_module.")] for key in model.state_dict()})
    x = images(source)
    assert_close(model(x), source.forward_intermediates(x, [1, 3], intermediates_only=True))


@pytest.mark.parametrize("name", SMALL)
def test_forward_intermediates(name):
    model = timm.create_model(name).eval()
    x = images(model)
    last = len(model.feature_info) - 1
    features = model.forward_features(x)
    final, maps = model.forward_intermediates(x)
    assert_close(final, features)
    assert len(maps) == last + 1
    norm = getattr(model, "norm", nn.Identity())
    assert_close(norm(maps[last]), features)
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert_close(normed, [*maps[:-1], features])
    assert_close(model.forward_intermediates(x, 2)[1], maps[-2:])
    assert_close(model.forward_intermediates(x, [0, -1])[1], [maps[0], maps[-1]])
    for i in range(last + 1):
        final, taken = model.forward_intermediates(x, [i], stop_early=True)
        assert_close(taken, [maps[i]])
        assert_close(final, features if i == last else taken[0])
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("name", ["ran_att56", *SMALL])
def test_prune_intermediate_layers(name):
    channels = (8, 8, 16) if "orig" in name else (8, 8, 16, 16)
    small = {} if name == "plain_cnn8_cifar" else {"channels": channels, "stem_chs": 8}
    model = timm.create_model(name, **small).eval()
    x = torch.randn(2, 3, 64, 64)
    maps, logits = model.forward_intermediates(x, intermediates_only=True), model(x)
    last = len(maps) - 1
    for i in range(last + 1):
        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers([i], prune_norm=True) == [i]
        assert_close(pruned.forward_intermediates(x, [i], intermediates_only=True), [maps[i]])
        assert_close(pruned(x), maps[i])
        pruned.reset_classifier(3, "avg")
        assert pruned(x).shape == (2, 3)
        assert pruned.num_features == maps[i].shape[1]
    model.prune_intermediate_layers([last], prune_head=False)
    assert_close(model(x), logits)


def test_layer_decay(network):
    model = network
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == {n for n, _ in model.named_parameters()}
    assert groups[model.pretrained_cfg["first_conv"] + ".weight"] == 0
    order = [groups[n] for n, _ in model.named_parameters()]
    assert order == sorted(order)
    assert len(set(order)) > len(model.stages)
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    # A stage of the plain network is a block of its own, coarse or fine.
    assert (len(set(coarse.values())) < len(set(order))) == isinstance(model, ResidualAttentionNet)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=1.0, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scale[id(model.get_classifier().weight)] == 1
    assert scale[id(model.get_parameter(model.pretrained_cfg["first_conv"] + ".weight"))] == 0.5 ** max(order)


@pytest.mark.parametrize("name", SMALL)
def test_dropout_and_stochastic_depth(name):
    model = timm.create_model(name, drop_rate=0.5, drop_path_rate=0.5)
    x = images(model)
    model.eval()
    assert_close(model(x), model(x))
    features = model.forward_features(x)
    model.head.train()
    assert not torch.equal(model.forward_head(features), model.forward_head(features))
    rates = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    assert rates == sorted(rates)
    assert (rates[-1] if rates else None) == (0.5 if isinstance(model, ResidualAttentionNet) else None)


@pytest.mark.parametrize("name", SMALL)
def test_training_step(name):
    model = timm.create_model(name, num_classes=5)
    model(images(model)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    checkpointed = timm.create_model(name, num_classes=5)
    checkpointed.load_state_dict(model.state_dict())
    checkpointed.set_grad_checkpointing()
    counts = [{n: b.item() for n, b in net.stages.named_buffers() if n.endswith("num_batches_tracked")}
              for net in (model, checkpointed)]
    x = images(model)
    for net in (model, checkpointed):
        net.zero_grad()
        net(x).square().mean().backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    assert_close({n: p.grad for n, p in checkpointed.named_parameters()}, expected)
    # Recomputed, each normalisation sees the batch twice.
    for net, before, times in zip((model, checkpointed), counts, (1, 2)):
        assert before.items() == {(n, b.item() - times) for n, b in net.stages.named_buffers() if n in before}
    checkpointed.set_grad_checkpointing(False)
    assert not any(stage.grad_checkpointing for stage in checkpointed.stages)


def test_synchronised_norms_keep_their_activations_with_timms_conversion():
    """As docs/scaling.md says; torch's own conversion silently drops them."""
    model = timm.create_model("ran_att56_cifar", device="meta")
    for convert, kind in ((timm.layers.convert_sync_batchnorm, "SyncBatchNormAct"),
                          (nn.SyncBatchNorm.convert_sync_batchnorm, "SyncBatchNorm")):
        norms = [m for m in convert(copy.deepcopy(model)).modules() if isinstance(m, nn.SyncBatchNorm)]
        assert len(norms) == 106
        assert {type(norm).__name__ for norm in norms} == {kind}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_set_scriptable(script):
    with set_scriptable(True):
        model = timm.create_model("plain_cnn8_cifar").eval()
    x = images(model)
    assert_close(script(model)(x), model(x))


@pytest.mark.parametrize("name", SMALL)
def test_fx_feature_extraction(name):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = timm.create_model(name).eval()
    x = images(model)
    tracer = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    graph = extraction.create_feature_extractor(model, {"stages.2": "map", "head.fc": "logits"}, tracer_kwargs=tracer)
    got = graph(x)
    assert_close(got["logits"], model(x))
    assert_close(got["map"], model.forward_intermediates(x, intermediates_only=True)[3 if "ran" in name else 2])


@pytest.mark.parametrize("name", SMALL)
def test_init_weights_after_the_meta_device(name):
    model = timm.create_model(name, device="meta").to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(99)
    model.init_weights()
    assert all(p.abs().max() < 10 for p in model.state_dict().values())


@pytest.mark.parametrize("name", SMALL)
def test_pretrained(name, tmp_path):
    source = timm.create_model(name)
    for p in source.parameters():
        nn.init.normal_(p, std=0.05)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    weights = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "weights.safetensors")}}
    first, classifier = (source.pretrained_cfg[key] + ".weight" for key in ("first_conv", "classifier"))
    state = source.state_dict()
    assert_close(timm.create_model(name, **weights).state_dict(), state)
    other = timm.create_model(name, num_classes=3, in_chans=1, **weights).state_dict()
    assert_close(other[first], state[first].sum(1, keepdim=True))
    assert other[classifier].shape[0] == 3
    kept = [n for n in state if n != first and not n.startswith("head.")]
    assert all(torch.equal(other[n], state[n]) for n in kept)
    x = images(source)
    pyramid = timm.create_model(name, features_only=True, **weights).eval()
    assert_close(pyramid(x), source.eval().forward_intermediates(x, intermediates_only=True))


def test_attention_arguments():
    args = {"mask": "local", "learning": "naive", "mask_act": "spatial", "t": 1}
    model = timm.create_model("ran_att56_cifar", attention_args=args)
    modules = [m for m in model.modules() if isinstance(m, AttentionModule)]
    assert [(type(m.mask).__name__, m.residual, len(m.trunk), m.mask.head.act.mask_act) for m in modules] == [
        ("LocalMaskBranch", False, 1, "spatial")] * 3
    args = {"act_layer": nn.SiLU, "norm_layer": "groupnorm1", "drop_path": 0.1}
    model = timm.create_model("ran_att56_cifar", attention_args=args)
    unit = model.stages[0].blocks[1].trunk[0]
    assert type(unit.norm1).__name__ == "GroupNorm1Act"
    assert type(unit.norm1.act) is nn.SiLU
    assert unit.drop_path.drop_prob == 0.1
    assert type(model.stages[0].blocks[0].norm1.act) is nn.ReLU
    model = timm.create_model("ran_att56", device="meta")
    assert [m.mask.mask_depth for m in model.modules() if isinstance(m, AttentionModule)] == [3, 2, 1]
