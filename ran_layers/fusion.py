"""Fold the normalisations of a trained network into its convolutions, for faster inference."""
import copy
import inspect
from collections import Counter
from typing import Any, TypeVar

import torch
import torch.fx
import torch.nn as nn
from timm.layers import BatchNormAct2d, Conv2dSame, FrozenBatchNormAct2d, SyncBatchNormAct
from timm.models import get_notrace_functions, get_notrace_modules
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

from .masks import evaluating

FROZEN_NORMS = (FrozenBatchNorm2d, FrozenBatchNormAct2d)  # what timm's freeze_batch_norm_2d leaves
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, *FROZEN_NORMS)  # timm's, with an activation, are subclasses
NORM_FORWARDS = [norm.forward for norm in (*BATCH_NORMS, BatchNormAct2d, SyncBatchNormAct)]  # others compute more
CONVS = (nn.Conv2d, Conv2dSame)  # by exact type: subclasses may compute their weights
Network = TypeVar("Network", bound=nn.Module)
REACH = torch.finfo(torch.float16).max  # no feature map goes further, whatever it is cast to


class ClampAct(nn.Module):
    """What is left of BN and ReLU before 1x1 convolutions: a clamp with bounds for each channel.

    With ``a`` and ``b`` the scale and shift of the BN, ``relu(a * x + b) = a * clamp(x) + b``, where ``clamp`` cuts
    ``x`` off at ``-b / a``: from below if ``a > 0``, from above if ``a < 0``. The following convolution can take ``a``
    and ``b`` into its weights and bias, so one pass over the feature map is left of three.

    Shapes:
        input and output ``(batch, channels, height, width)``.

    Example:
        >>> clamp = ClampAct(low=torch.tensor([0.0]), high=torch.tensor([6.0]))
        >>> clamp(torch.tensor([[[[-1.0, 3.0, 9.0]]]])).flatten()
        tensor([0., 3., 6.])
    """

    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, low: torch.Tensor, high: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("low", low.view(1, -1, 1, 1))
        self.register_buffer("high", high.view(1, -1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.clamp(x, self.low, self.high)


def fuse(model: Network, *, inplace: bool = False) -> Network:
    """Return ``model`` for inference: in eval mode, BN folded into convolutions, weights in channels-last order.

    Two foldings, both exact up to rounding:

    - A BN right behind a convolution goes into that convolution's weights and bias; its activation stays.
    - A BN and ReLU in front of 1x1 convolutions, as opens a pre-activation unit, goes into those that follow, and a
      :class:`ClampAct` stays.

    BN frozen by timm's ``freeze_batch_norm_2d`` are folded too. Of the 106 BN of ``ran_att56_cifar`` one is left,
    before the pooling. Channels-last order is what makes it pay on a CPU (``benchmarks/fuse.py``): the convolutions
    need no reordering of their inputs, and the clamp is one vectorised pass. Images may come in either order. Any
    network that ``torch.fx`` can trace will do; what does not fit one of the two patterns stays as it is, and so does
    what is called twice, has two names, hooks or a forward of its own, or lends its weights to something else. The
    result cannot be trained any further, and answers for ``forward`` with its default arguments, and for timm's
    interface where that runs the same layers. Fuse in float32, then cast. Save the network from before: the weights of
    a fused one fit no other, so fuse after loading.

    Args:
        model: The network; its normalisations must have running statistics to be folded.
        inplace: Change ``model`` itself instead of a copy.

    Returns:
        A network of the same class.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: It cannot be copied (a pruned one), ``torch.fx`` cannot trace it, it is the result of
            ``torch.compile``, or wrapped for several devices; it is then as it was.

    Example:
        >>> import timm
        >>> model = timm.create_model("ran_att56_cifar").eval()
        >>> images = torch.randn(2, 3, 32, 32)
        >>> torch.allclose(fuse(model)(images), model(images), atol=1e-4)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r} ({type(model).__name__})")
    if hasattr(model, "_orig_mod"):
        raise ValueError("model must be fused before it is compiled: torch.compile(fuse(model))")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(f"model must not be wrapped in {type(model).__name__}: fuse(model.module)")
    if not inplace:
        model = _copy_of(model)
    with evaluating(model):
        graph = _trace(model)
    lent = _lent(model, graph)
    modules = _foldable_modules(model, graph, lent)
    levels, watched = _feature_levels(model), _watched(model)
    for node in graph.nodes:
        norm = modules.get(node)
        if not isinstance(norm, BATCH_NORMS) or type(norm).forward not in NORM_FORWARDS or norm.running_mean is None:
            continue
        source = node.all_input_nodes[0]
        before = modules.get(source) if len(source.users) == 1 else None
        after: list[Any] = [modules.get(user) for user in node.users]
        act = getattr(norm, "act", None)  # timm's BN with an activation
        if type(before) in CONVS and not _ends_between(levels, watched, source, node):
            left = _fold_into_previous(before, norm)
        elif (type(act) is nn.ReLU and only_runs(act) and after and all(map(_is_pointwise, after))
              and not any(_ends_between(levels, watched, node, user) for user in node.users)):
            left = _fold_into_next(norm, after)
        else:
            continue
        model.set_submodule(node.target, left)
    model.eval()  # with what came in
    for name, module in model.named_modules():
        # What others do with their weights, or with those that are lent to them, may need another order.
        if type(module) in (*CONVS, nn.ConvTranspose2d) and name not in lent:
            weight: Any = module.weight
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return model


def _copy_of(model: Network) -> Network:
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:  # of weights that each forward computes anew, as pruning does; of a lock
        raise ValueError(f"model must be one that copy.deepcopy can copy, or be fused with inplace=True; "
                         f"{type(model).__name__} fails with: {_reason(error)}") from error


def _fold_into_previous(conv: Any, norm: Any) -> nn.Module:
    """Put ``norm`` into the convolution in front of it; return its activation."""
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    conv.bias.requires_grad_(conv.weight.requires_grad)
    return getattr(norm, "act", nn.Identity())


@torch.no_grad()
def _fold_into_next(norm: Any, convs: list[Any]) -> nn.Module:
    """Put ``norm``, which ends in a ReLU, into the 1x1 convolutions behind it; return the clamp that is left."""
    dtype = convs[0].weight.dtype  # a network in bfloat16 may have norms in float32; its maps are as its convolutions
    full = torch.promote_types(torch.promote_types(dtype, norm.running_var.dtype), torch.float32)
    scale = torch.rsqrt(norm.running_var.to(full) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias

    bound = -shift / scale
    # A channel with (almost) no scale is cut off everywhere or nowhere.
    cut = bound.abs() < REACH
    off = ~cut & ~(shift > 0)
    scale, shift = scale.masked_fill(off, 0), shift.masked_fill(off, 0)
    low = torch.where(cut & (scale > 0), bound, -torch.inf).masked_fill(off, 0)
    high = torch.where(cut & (scale < 0), bound, torch.inf).masked_fill(off, 0)

    for conv in convs:
        bias, trained = conv.weight.flatten(1).to(full) @ shift, conv.weight.requires_grad
        conv.bias = nn.Parameter((bias if conv.bias is None else conv.bias + bias).to(dtype), trained)
        conv.weight = nn.Parameter((conv.weight * scale.view(1, -1, 1, 1)).to(dtype), trained)
    return ClampAct(low.to(dtype), high.to(dtype))


def _is_pointwise(conv: Any) -> bool:
    """Whether this is a convolution that reads one position and all channels, so that a constant can go through it."""
    return type(conv) is nn.Conv2d and conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


class _Tracer(torch.fx.Tracer):
    """Follows a forward pass down to torch's own layers and those that timm names as not to be looked into."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        leaves = (*get_notrace_modules(), *CONVS, *FROZEN_NORMS)
        return isinstance(module, leaves) or super().is_leaf_module(module, name)


def _feature_levels(model: nn.Module) -> set[str]:
    """Return the names of the modules whose outputs are to stay, a timm model's feature maps."""
    info: Any = getattr(model, "feature_info", None) or []
    levels = info.module_name() if hasattr(info, "module_name") else (level["module"] for level in info)
    return set(levels)


def _watched(model: nn.Module) -> set[str]:
    """Return the names of the modules whose inputs and outputs somebody sees or changes."""
    return {name for name, module in model.named_modules() if name and not only_runs(module)}


def only_runs(module: nn.Module) -> bool:
    """Whether to call ``module`` is to run the forward of its class: it has no hooks and no forward of its own.

    Hooks look at what goes in and out or change it, as those of pruning and of an inserted Attention Module.
    """
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _ends_between(levels: set[str], watched: set[str], first: torch.fx.Node, second: torch.fx.Node) -> bool:
    """Whether the map between two modules in a row is to stay as it is.

    The first is in a level or in what is ``watched``, perhaps its last, and the second is not; or the second is in what
    is watched, and the first is not.
    """
    def is_in(node: torch.fx.Node, level: str) -> bool:
        return node.target == level or str(node.target).startswith(f"{level}.")

    return any(is_in(first, level) and not is_in(second, level) for level in levels | watched) or any(
        is_in(second, level) and not is_in(first, level) for level in watched)


def _trace(model: nn.Module) -> torch.fx.Graph:
    before = [(module, dict(vars(module))) for module in model.modules()]
    set_grad_checkpointing = getattr(model, "set_grad_checkpointing", None)
    if callable(set_grad_checkpointing):  # of no use in inference, and in the way of tracing
        set_grad_checkpointing(False)
    try:
        # An argument that is left out has its default: without it, fx follows the branch where it is given.
        defaults = {name: parameter.default for name, parameter in inspect.signature(model.forward).parameters.items()
                    if parameter.default is not parameter.empty}
        return _Tracer().trace(model, concrete_args=defaults or None)
    except Exception as error:  # a forward pass with control flow fails in many ways
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)
        raise ValueError(f"model must have a forward pass that torch.fx can trace; {type(model).__name__} has not: "
                         f"{_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _lent(model: nn.Module, graph: torch.fx.Graph) -> set[str]:
    """Return the names of the modules of which the forward pass reads a tensor by itself, under any of its names."""
    tensors = {name: tensor for kind in (model.named_parameters, model.named_buffers)
               for name, tensor in kind(remove_duplicate=False)}
    read = {id(tensors[node.target]) for node in graph.nodes if node.op == "get_attr" and node.target in tensors}
    return {name.rpartition(".")[0] for name, tensor in tensors.items() if id(tensor) in read}


def _foldable_modules(
        model: nn.Module, graph: torch.fx.Graph, lent: set[str]) -> dict[torch.fx.Node, nn.Module]:
    """Return the module of each graph node that calls one which is used only there, in the way of its class."""
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(modules[node.target] for node in calls)
    names = Counter(modules.values())
    return {
        node: module for node in calls
        if times[module := modules[node.target]] == names[module] == 1 and node.target not in lent
        and only_runs(module)
    }
