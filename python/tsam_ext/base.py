"""The optimizer that TSAM wraps: built or taken, and refused where it cannot be wrapped.

Our keys in its groups are rho, radius and adaptive; where the base has an option of that name, tsam_rho and so on.
Beside them stand, without a value, the names of the numbers that a checkpoint has in each group: the flat form of
torch.distributed.checkpoint loads only what a live group has.
Invariant: what base_of returns steps once from p.grad and holds parameters that the kernels can move in place; its
groups have our keys whoever loads it, and its own state dict has no name without a value.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import checkpoint, hooks
from ._cuda import why_not
from .engine.checks import DTYPES, TSAM, is_dense, refuse, shown
from .replicas import refuse_hidden
from .samplers import Sampler, owner_of
from .settings import GROUP_KEYS, check_group_options, check_group_values
from .shards import as_local, is_sharded, sharding_of_all
from .table import COMPLEX, maximizes

OPTIMIZER = "a torch.optim.Optimizer class or instance"


def base_of(params: Any, base: object, kwargs: dict[str, Any], sampler: Sampler) -> Optimizer:
    """The base optimizer from its class or instance; refuses those that TSAM cannot wrap."""
    if isinstance(params, Optimizer):  # TSAM(SGD(...)), where base is the default
        if base is not torch.optim.SGD:
            raise refuse(TSAM, "base_optimizer", shown(base), "nothing beside an optimizer as params", TypeError)
        params, base = None, params
    if isinstance(base, type) and issubclass(base, Optimizer):
        _refuse_kind(base)
        if params is None:
            raise refuse(TSAM, "params", "None", "parameters, as base_optimizer is a class", TypeError)
        return _built(cast(Callable[..., Optimizer], base), params, kwargs, sampler)
    if not isinstance(base, Optimizer):
        raise refuse(TSAM, "base_optimizer", shown(base), OPTIMIZER, TypeError)
    _refuse_kind(type(base))
    for name, value in kwargs.items():
        if owner := owner_of(name, sampler):
            raise _misplaced(name, owner)
        raise refuse(TSAM, name, shown(value), "no base options beside an instance", TypeError)
    if params is not None:
        given = [p for item in list(params) for p in _flat(item)]
        held = [p for group in base.param_groups for p in group["params"]]
        if len(given) != len(held) or any(a is not b for a, b in zip(given, held, strict=True)):
            expected = "None, or the tensors of base_optimizer"
            raise refuse(TSAM, "params", "other tensors or another order", expected)
    if base.defaults.keys() >= set(GROUP_KEYS):
        got = f"{type(base).__name__} with options {', '.join(GROUP_KEYS)}"
        raise refuse(TSAM, "base_optimizer", got, "an optimizer that no TSAM holds already")
    return base


def _flat(item: Any) -> list[Any]:
    """The tensors of an entry of ``params``: a tensor, a (name, tensor) pair, or a group of either."""
    if isinstance(item, dict):
        params = item["params"]
        entries = [params] if isinstance(params, Tensor) else list(params)
        return [tensor for entry in entries for tensor in _flat(entry)]
    return [item[1]] if isinstance(item, tuple) and len(item) == 2 else [item]


def _refuse_kind(kind: type[Optimizer]) -> None:
    if issubclass(kind, (torch.optim.LBFGS, torch.optim.SparseAdam)) or hasattr(kind, "estimate_gradient"):
        expected = "an optimizer that steps once from p.grad (not LBFGS, SparseAdam)"
        raise refuse(TSAM, "base_optimizer", kind.__name__, expected)


def _built(kind: Callable[..., Optimizer], params: Any, kwargs: dict[str, Any], sampler: Sampler) -> Optimizer:
    """The base from its class; a sampler's option among its own is refused unless the class has one of that name."""
    owned = {name: owner for name in kwargs if (owner := owner_of(name, sampler))}
    try:
        base = kind(params, **kwargs)
    except TypeError as error:
        for name, owner in owned.items():
            if name in str(error):
                raise _misplaced(name, owner) from error
        raise
    for name, owner in owned.items():
        if name not in base.defaults and name not in _named_options(kind):  # swallowed by **kwargs
            raise _misplaced(name, owner)
    return base


def _named_options(kind: Callable[..., Optimizer]) -> set[str]:
    try:
        return set(inspect.signature(kind).parameters)
    except (TypeError, ValueError):  # compiled classes have no signature
        return set()


def _misplaced(option: str, owner: str) -> Exception:
    return TypeError(f"TSAM: {option} belongs to the sampler: sampler={owner}({option}=...)")


def named_parameters(groups: list[dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Every parameter with its place in the groups."""
    for g, group in enumerate(groups):
        for i, parameter in enumerate(group["params"]):
            yield f"param_groups[{g}]['params'][{i}]", parameter


def check_parameters(named: Iterator[tuple[str, Tensor]]) -> None:
    """Refuses parameters that no kernel can perturb in place; names the first, or the first overlapping pair.

    Frozen ones may be anything, and fake ones or those on meta come to lie somewhere later: ops look again.
    """
    spans: list[tuple[int, int, str]] = []
    trainable = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    sharding_of_all(trainable)
    for name, parameter in trainable:
        refuse_hidden(name, parameter)
        if is_traceable_wrapper_subclass(parameter) and not is_sharded(parameter):
            got = f"a {type(parameter).__name__}, which holds other tensors"
            raise refuse(TSAM, name, got, "a tensor with memory of its own, or a DTensor")
        parameter = as_local(parameter)
        if parameter.layout is not torch.strided:
            raise refuse(TSAM, name, f"a {parameter.layout} tensor", "a dense tensor")
        if parameter.dtype not in DTYPES and parameter.dtype not in COMPLEX:
            expected = "a float32, float64, bfloat16, float16, complex64 or complex128 tensor"
            raise refuse(TSAM, name, f"a {parameter.dtype} tensor", expected)
        material = parameter.device.type != "meta" and not isinstance(parameter, FakeTensor)
        if material and (cause := why_not(parameter.device)) is not None:
            raise refuse(TSAM, name, f"a tensor on {parameter.device}", f"one that kernels run on ({cause})")
        if not is_dense(parameter) or parameter.is_conj():
            got = f"strides {parameter.stride()} for shape {tuple(parameter.shape)}"
            raise refuse(TSAM, name, got, "a dense tensor")
        if parameter.numel() and material:
            begin = parameter.data_ptr()
            spans.append((begin, begin + parameter.numel() * parameter.element_size(), name))
    spans.sort()
    for (_, end, before), (begin, _, after) in itertools.pairwise(spans):
        if begin < end:
            raise refuse(TSAM, after, f"memory shared with {before}", "parameters that do not overlap")


def make_capturable(base: Optimizer, *, own: bool) -> None:
    """Has a base on a GPU that was made here (``own``) count its steps there too; refuses another that does not."""
    for g, group in enumerate(base.param_groups):
        if group.get("capturable") is False and any(p.device.type == "cuda" for p in group["params"]):
            if not own:
                raise refuse(TSAM, f"param_groups[{g}].capturable", False, "True, as TSAM's capturable is True")
            group["capturable"] = base.defaults["capturable"] = True


def with_capturable(state: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A base's state dict with the ``capturable`` that ``groups`` have: it says where steps are counted here."""
    saved = [
        {**old, "capturable": group["capturable"]} if "capturable" in group else old
        for old, group in zip(state["param_groups"], groups, strict=False)
    ]
    return {**state, "param_groups": saved + state["param_groups"][len(saved) :]}


def _hide_own(names: Mapping[str, str], base: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A base's own state dict; ``names``: what our keys are called in its groups."""
    return checkpoint.of_base(state, names)


def _keep_own(names: Mapping[str, str], defaults: Mapping[str, Any], base: Optimizer, state: Any) -> dict[str, Any]:
    """What a base is about to load, with our keys as its live groups have them where it comes without."""
    state = checkpoint.of_base(state, names)
    groups = [
        {**{key: here.get(key, value) for key, value in defaults.items()}, **group}
        for group, here in zip(state["param_groups"], base.param_groups, strict=False)
    ]
    return {**state, "param_groups": groups + state["param_groups"][len(groups) :]}


class WrappingOptimizer(Optimizer):
    """An optimizer whose groups, state and defaults are those of a base optimizer, with keys of its own in each group.

    ``own``: values of our keys where a group does not set them. ``given``: those that the user has set for all groups.
    ``foreign``: the base came as an instance, whose groups may hold whatever its owner has put there.
    """

    def __init__(
        self, base: Optimizer, sampler: Sampler, *, own: dict[str, Any], given: dict[str, Any], foreign: bool
    ) -> None:
        self.group_names = {key: f"tsam_{key}" if key in base.defaults else key for key in GROUP_KEYS}
        self.sampler, self._given, self._names = sampler, given, checkpoint.names(sampler.keeps)
        self._base_options = set(base.defaults)
        if foreign:
            self._base_options.update(*base.param_groups)
        sampler.check_lengths("", given, {})
        for g, group in enumerate(base.param_groups):
            self._check_new_group(group, f"param_groups[{g}].")
        check_parameters(named_parameters(base.param_groups))
        maximizes(base.param_groups)
        self._base: Optimizer | None = None
        hooks.run_own_step_hooks(type(self))
        super().__init__(base.param_groups, {})
        self._base = base
        self._own_defaults: dict[str, Any] = {self.group_names[key]: value for key, value in own.items()}
        self._own_defaults |= dict.fromkeys(self._names)
        self.set_group_keys()
        self._look_after_base()

    def _look_after_base(self) -> None:
        """When the base is saved or loaded by itself, its groups keep our keys, and names without a value stay here."""
        base = self.base_optimizer
        if hasattr(base, "_optimizer_load_state_dict_pre_hooks"):  # not so wrappers that are no whole Optimizer
            base.register_load_state_dict_pre_hook(partial(_keep_own, self.group_names, self._own_defaults))
            base.register_state_dict_post_hook(partial(_hide_own, self.group_names))

    def options(self, group: dict[str, Any]) -> list[str]:
        """The names of a group's options in order: not its parameters, nor the names without a value."""
        return sorted(group.keys() - {"params", *self._names})

    def _check_new_group(self, group: dict[str, Any], where: str) -> None:
        check_group_values(group, where, self.group_names)
        named = {key: value for key, value in group.items() if value is not None or key not in self._names}
        check_group_options(named, where, self.group_names, self.sampler, self._base_options)
        own = {key: group[name] for key, name in self.group_names.items() if name in group}
        self.sampler.check_lengths(where, own, self._given)

    # The groups, the state and the defaults are the base optimizer's own. Properties, since both objects rebind them
    # in load_state_dict; the setters do nothing while Optimizer.__init__ runs.

    @property
    def base_optimizer(self) -> Optimizer:
        """The wrapped optimizer.

        Hooks registered on it run with it, once, when it is stepped, saved or loaded, by TSAM or alone; those of its
        state see no entry of TSAM's. torch's global step hooks run there too.
        """
        assert self._base is not None
        return self._base

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups."""
        return self._base.param_groups if self._base is not None else []

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._base is not None:
            self._base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's state."""
        return self.beside(self._base.state) if self._base is not None else {}

    @state.setter
    def state(self, state: Any) -> None:
        if self._base is not None:
            self._base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults, with our keys among them."""
        return self._base.defaults if self._base is not None else {}

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        if self._base is not None:
            self._base.defaults = defaults

    def beside(self, state: Any) -> Any:
        """The base optimizer's state as it is shown: as it is."""
        return state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base optimizer's ``zero_grad``, which may clear more than ``p.grad``."""
        if set_to_none:
            self.base_optimizer.zero_grad()
        else:
            self.base_optimizer.zero_grad(set_to_none=False)

    def set_group_keys(self) -> None:
        """Our keys in the base's defaults, and in the groups that do not have them."""
        for name, value in self._own_defaults.items():
            self.base_optimizer.defaults[name] = value
            for group in self.base_optimizer.param_groups:
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as the base optimizer does; the group may set rho, radius and adaptive of its own."""
        if self._base is None:
            return
        index = len(self._base.param_groups)
        self._check_new_group(param_group, f"param_groups[{index}].")
        self._base.add_param_group(param_group)
        try:
            check_parameters(named_parameters(self._base.param_groups))
            maximizes(self._base.param_groups)
        except (TypeError, ValueError):
            del self._base.param_groups[index]
            raise

    def __getstate__(self) -> dict[str, Any]:
        # Not the hooks and patches that schedulers and wrappers have put on this object.
        keep = ("_base", "sampler", "_given", "_base_options", "_own_defaults", "_names", "group_names")
        return {key: self.__dict__[key] for key in keep}

    def __setstate__(self, state: dict[str, Any]) -> None:
        hooks.run_own_step_hooks(type(self))
        super().__setstate__(state)
        self._look_after_base()
