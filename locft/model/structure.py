"""The parts of a block, inferred from its structure: attention, MLP or experts, mixer, and the matrices of each.

Shapes show which matrices read the hidden size and which write it; names are used only for what shapes cannot show:
queries versus keys versus values, gate versus up, the direction of a square matrix. Nothing is computed, so a model on
the meta device will do. What structure and names leave open, or disagree on, is left out: a missing position is better
than a wrong one.

Legend: D hidden size, F inner size of an MLP.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers.pytorch_utils import Conv1D

Parts = Mapping[str, tuple[str, ...]]
"""Module (one of `families.MODULES`) -> paths inside a block, of submodules or of parameters."""

_ATTENTION = {"attn", "att", "attention"}
_NO_PART = {"cross", "crossattention", "encoder", "adapter", "adapters", "lora"}
"""Words for attention to another model's states, which a causal LM skips, and for what was added to a model."""
_MLP_WORDS = {"mlp", "mlps", "ffn", "ff", "ffw", "feed", "feedforward", "moe", "expert", "experts", "fc", "channel"}
_RECURRENT = re.compile(
    r"mamba\d*|\w?lstm|ssm|recurrent|recurrence|(rg)?lru|rwkv\d*|delta(net)?|(short)?conv(olution)?(\dd)?|retention|hyena|"
    "lightning|kda|gla"
)
"""A word that names a state space, a linear attention or a convolution."""
_STATES = {"A_log", "dt_bias", "time_decay", "D"}
"""Names of parameters that only recurrent blocks have."""
_LETTERS = {
    word: letter
    for letter, words in (("q", "q query queries"), ("k", "k key keys"), ("v", "v value values"))
    for word in words.split()
}
_ASIDE = {"pos", "position", "rel", "relative", "index", "indexer"}
"""Words for projections that attention has in addition to those of queries, keys and values."""
_GENERIC = {"linear", "dense", "proj", "weight", "base", "layer"}
"""Words of last path components that say nothing: the component before them is used."""
_DOWN = {"down", "out", "output", "o", "w2", "fc2", "lin2", "linear2"}
_UP = {"up", "in", "input", "intermediate", "wi", "fc1", "lin1", "linear1"}
_GATED_PAIRS = (("w1", "w3"), ("w1", "v1"), ("wi_0", "wi_1"), ("w_0", "w_1"))
"""Last path components of gate and up where neither word occurs: LLaMA's, DBRX's, T5's and CPM-Ant's."""


@dataclass(frozen=True)
class _Matrix:
    """A matrix, or a stack of one matrix per expert."""

    path: str
    """Inside the block: that of its module, or that of the parameter if it is not called "weight"."""
    out: int
    inputs: int
    stacked: bool
    """True for a stack, whose direction only its name reliably shows."""

    @property
    def name(self) -> str:
        """The last component of its path that says something."""
        names = [name for name in self.path.split(".") if not name.isdigit()] or [self.path]
        while len(names) > 1 and _words(names[-1]) <= _GENERIC:
            names.pop()
        return names[-1]

    @property
    def words(self) -> set[str]:
        return _words(self.name)

    @property
    def letters(self) -> str:
        """Which of q, k, v its name refers to: "", "q", "kv", ..."""
        return _letters(self.name)

    def below(self, path: str) -> bool:
        return f"{self.path}.".startswith(f"{path}.")


@dataclass(frozen=True)
class _Component:
    kind: str
    """attn, mlp or mixer."""
    paths: tuple[str, ...]
    matrices: tuple[_Matrix, ...]

    @property
    def named(self) -> bool:
        """Whether its name says that it is an MLP."""
        return any(_words(path) & _MLP_WORDS for path in self.paths)


def parts_of(block: nn.Module, hidden: int, layer_type: str = "") -> Parts:
    """The parts of a block that its structure shows. hidden: D. layer_type: the configuration's name for this kind of layer."""
    parts: dict[str, list[str]] = {}
    components = _components(block, hidden, layer_type)
    found = [(c, {"attn": _attention, "mlp": _mlp, "mixer": _mixer}[c.kind](c, hidden)) for c in components]
    found = [(c, roles) for c, roles in found if c.kind != "attn" or set(roles) - {"attn_o"}]
    routed = any("experts_down" in roles for _, roles in found)
    for component, roles in found:
        parts.setdefault(component.kind, []).extend(component.paths)
        beside = routed and any("shared" in _words(path) for path in component.paths)  # a separate shared expert
        for module, paths in roles.items():
            parts.setdefault(module.replace("mlp_", "shared_") if beside else module, []).extend(paths)
    return {module: tuple(paths) for module, paths in parts.items() if paths}


def is_input_first(model: nn.Module, name: str) -> bool:
    """Whether a matrix is stored (in, out) and its product is `input @ matrix`, as in GPT-2 and the experts of gpt-oss."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return isinstance(owner, Conv1D) or bool(getattr(owner, "is_transposed", False))


def _components(block: nn.Module, hidden: int, layer_type: str) -> list[_Component]:
    """The components of a block. Its loose matrices (OPT's fc1 and fc2, BERT's halves of an MLP) together form one."""
    finder = _Finder(block, hidden, layer_type)
    found = [component for name, _ in block.named_children() for component in finder.below(name)]
    loose = [
        matrix
        for matrix in finder.matrices
        if not any(matrix.below(path) for path in (*finder.ignored, *(p for c in found for p in c.paths)))
    ]
    mlps = [component for component in found if component.kind == "mlp"]
    others = [component for component in found if component.kind != "mlp"]
    if not others and set("qkv") <= {letter for matrix in loose for letter in matrix.letters}:
        inline = [m for m in loose if m.letters or (m.words & {"o", "out"} and m.out == hidden)]
        others = [_Component("attn", tuple(matrix.path for matrix in inline), tuple(inline))]
        loose = [matrix for matrix in loose if matrix not in inline]
    if re.search("linear|mamba|recurrent|conv", layer_type) and not any(c.kind == "mixer" for c in others):
        others = [replace(component, kind="mixer") for component in others]
    if len(mlps) > 1:
        mlps = [component for component in mlps if component.named]
    if not mlps and (dense := _dense(loose, hidden)):
        paths = tuple(path for role in dense.values() for path in role)
        mlps = [_Component("mlp", paths, tuple(m for m in loose if m.path in paths))]
    return others + [_with_router(component, loose) for component in mlps]


def _with_router(component: _Component, loose: Sequence[_Matrix]) -> _Component:
    """Add the router to experts that lie directly in the block, since theirs lies next to them."""
    if "experts" not in component.paths:
        return component
    router = [matrix for matrix in loose if _is_router(matrix.path.split(".")[0])]
    paths = tuple({matrix.path.split(".")[0]: None for matrix in router})
    return _Component("mlp", component.paths + paths, component.matrices + tuple(router))


class _Finder:
    """Looks for components in the tree of a block."""

    def __init__(self, block: nn.Module, hidden: int, layer_type: str):
        self.block, self.hidden, self.layer_type = block, hidden, layer_type
        self.matrices = tuple(_matrices(block))
        self.ignored: list[str] = []

    def below(self, path: str) -> list[_Component]:
        """The components at or below a path: the largest module that is one component, otherwise the components in it."""
        module, words = self.block.get_submodule(path), _words(path.rpartition(".")[2])
        own = tuple(matrix for matrix in self.matrices if matrix.below(path))
        if (words & _NO_PART) or (_is_norm(words) and not words & _ATTENTION):
            self.ignored.append(path)
            return []
        if self._mixes(module, path, own):
            return [_Component("mixer" if self._recurrent(module, path) else "attn", (path,), own)]
        found = [component for name, _ in module.named_children() for component in self.below(f"{path}.{name}")]
        mixing = [component for component in found if component.kind != "mlp"]
        if not mixing:
            whole = self._is_mlp(own) or any("experts" in p.removeprefix(path) for c in found for p in c.paths)
            return [_Component("mlp", (path,), own)] if whole else found
        rest = [matrix for matrix in own if not any(matrix.below(p) for c in found for p in c.paths)]
        if len(found) == 1 and not _is_norm(words) and (rest or (mixing[0].kind == "attn" and words & _ATTENTION)):
            return [_Component(mixing[0].kind, (path,), own)]
        return found

    def _mixes(self, module: nn.Module, path: str, own: Sequence[_Matrix]) -> bool:
        """Whether a module mixes tokens, judging by its own children."""
        direct = [matrix for matrix in own if matrix.path.count(".") == path.count(".") + 1]
        names = [name for name, _ in (*module.named_children(), *module.named_parameters(recurse=False))]
        letters = set("".join(_letters(name) for name in names))
        attention = bool(_words(path.rpartition(".")[2]) & _ATTENTION)
        writes = len(own) > 1 and any(matrix.out == self.hidden for matrix in own)
        if {"q", "k", "v"} <= letters or (writes and "q" in letters and letters & {"k", "v"}):
            return True
        if attention and ((writes and letters) or self._closed(direct)):
            return True
        return bool(direct) and self._recurrent(module, path) and self._closed(own)

    def _recurrent(self, module: nn.Module, path: str) -> bool:
        name = path.rpartition(".")[2]
        kind = _without_common_start(type(module).__name__, type(self.block).__name__)
        if any(name in _STATES for name, _ in module.named_parameters(recurse=False)):
            return True
        words = _words(kind) | _words(name)
        linear = "linear" in words and bool(words & _ATTENTION) and not self.layer_type
        return linear or any(_RECURRENT.fullmatch(word) for word in words)

    def _closed(self, own: Sequence[_Matrix]) -> bool:
        """Whether they lead from the hidden size back to it."""
        return any(m.inputs == self.hidden for m in own) and any(m.out == self.hidden for m in own) and len(own) > 1

    def _is_mlp(self, own: Sequence[_Matrix]) -> bool:
        return any(m.stacked and self.hidden in (m.out, m.inputs) for m in own) or bool(_dense(own, self.hidden))


def _attention(component: _Component, hidden: int) -> dict[str, list[str]]:
    """The matrices of queries, keys and values, and the one that leads back to the hidden states."""
    aside = [m for m in component.matrices if m.words & _ASIDE or ("gate" in m.words and m.inputs == hidden)]
    named = [m for m in component.matrices if m not in aside]
    asking = [m for m in named if m.letters in ("q", "k", "v", "kv", "qkv")]
    outs = [m for m in named if m not in asking and m.words & {"o", "out", "output"} and "experts" not in m.path]
    asking, outs = _highest(asking), _highest([m for m in outs if not m.words & {"gate", "up", "in"}])
    if not any(m.out == hidden or m.stacked for m in outs):
        outs = []
    direct = _highest([m for m in component.matrices if m not in (*asking, *outs) and not m.stacked])
    rest = [m for m in direct if not m.words & {"gate", "g"}]
    writes = [m for m in rest if m.out == hidden]
    if not outs and len(writes) == 1:
        outs = writes
    roles: dict[str, list[str]] = {"attn_o": [m.path for m in outs]}
    for matrix in asking:
        roles.setdefault(f"attn_{matrix.letters}", []).append(matrix.path)
    fused = [m for m in rest if m.inputs == hidden and m not in outs and m.out > hidden // 2]
    if not asking and len(fused) == 1 and outs and outs[0].inputs < fused[0].out <= 3 * outs[0].inputs:
        roles["attn_qkv"] = [fused[0].path]
    return roles


def _mixer(component: _Component, hidden: int) -> dict[str, list[str]]:
    """The matrices that read the hidden states, and the one that leads back to them."""
    direct = _highest([matrix for matrix in component.matrices if not matrix.stacked])
    outs = [m for m in direct if m.out == hidden and m.words & {"out", "o", "output"} and "gate" not in m.words]
    ins = [m for m in direct if m.inputs == hidden and m not in outs]
    if len(outs) != 1 or not ins:
        return {}
    return {"mixer_in": [m.path for m in ins], "mixer_out": [m.path for m in outs]}


def _mlp(component: _Component, hidden: int) -> dict[str, list[str]]:
    shared, experts, rest = list[_Matrix](), list[_Matrix](), list[_Matrix]()
    for matrix in component.matrices:
        words = _words(matrix.path)
        if "shared" in words:
            shared.append(matrix)
        elif matrix.stacked or words & {"experts", "expert"}:
            experts.append(matrix)
        else:
            rest.append(matrix)
    if not experts:
        return {f"mlp_{role}": paths for role, paths in _dense(shared + rest, hidden).items()}
    parts = {f"shared_{role}": paths for role, paths in _dense(shared, hidden).items()}
    parts |= {f"experts_{role}": paths for role, paths in _stacked_roles(experts, hidden).items()}
    return parts | {"router": _router(component, experts, hidden)}


def _router(component: _Component, experts: Sequence[_Matrix], hidden: int) -> list[str]:
    """The child of the experts' module that chooses among them."""
    depth = len(component.paths[0].split(".")) if len(component.paths) == 1 else 0
    children = dict.fromkeys(".".join(matrix.path.split(".")[: depth + 1]) for matrix in component.matrices)
    return [
        path
        for path in children
        if _is_router(path.rpartition(".")[2])
        and any(m.below(path) and m.inputs == hidden and m.out > 1 for m in component.matrices)
        and not any(matrix.below(path) for matrix in experts)
    ]


def _stacked_roles(experts: Sequence[_Matrix], hidden: int) -> dict[str, list[str]]:
    """Roles of the matrices of routed experts: down leads back to the hidden size, gate_up is everything that leads from it."""
    pairs = {last for pair in _GATED_PAIRS for last in pair}
    down, up = list[str](), list[str]()
    for matrix in experts:
        role = _named_role(matrix) or ("up" if matrix.path.rpartition(".")[2] in pairs else "")
        if not matrix.stacked and matrix.out != matrix.inputs:
            role = "down" if matrix.out == hidden else "up" if matrix.inputs == hidden else ""
        if role:
            (down if role == "down" else up).append(matrix.path)
    return {"down": down, "gate_up": up} if down and up else {}


def _dense(matrices: Sequence[_Matrix], hidden: int) -> dict[str, list[str]]:
    """Roles of the matrices of one MLP, or of several alike: down, and up, gate and up, or both in one. Empty if it is no MLP."""
    groups: dict[str, list[_Matrix]] = {}
    for matrix in matrices:
        groups.setdefault(re.sub(r"^((?:.*\.)?\d+)\..*|.*", r"\1", matrix.path), []).append(matrix)
    if len(groups) > 1 and "" not in groups:
        each = [_dense_roles(group, hidden) for group in groups.values()]
        return {role: [path for roles in each for path in roles.get(role, [])] for role in each[0]}
    return _dense_roles(matrices, hidden)


def _dense_roles(matrices: Sequence[_Matrix], hidden: int) -> dict[str, list[str]]:
    writes = [m for m in matrices if m.out == hidden and m.inputs != hidden]
    square = [m for m in matrices if m.out == hidden == m.inputs]
    if len(writes) != 1:
        writes = [m for m in (writes or square) if _named_role(m) == "down"]
    if len(writes) != 1:
        return {}
    down = writes[0]
    inner = down.inputs
    reads = [m for m in matrices if m is not down and m.inputs == hidden and m.out > 1 and not m.words & _NO_PART]
    both = [m for m in reads if m.out == 2 * inner]
    single = [m for m in reads if m.out == inner]
    if len(reads) > len(both) + len(single):  # something other than an MLP
        return {}
    roles = {"down": [down.path]}
    if len(both) == 1 and not single:
        return roles | {"gate_up": [both[0].path]}
    if len(single) == 1 and not both:
        return roles | {"up": [single[0].path]}
    if len(single) != 2 or both:
        return {}
    for gate, up in (single, single[::-1]):
        names = (gate.path.rpartition(".")[2], up.path.rpartition(".")[2])
        if names in _GATED_PAIRS or ("gate" in gate.words and "gate" not in up.words):
            return roles | {"up": [up.path], "gate": [gate.path]}
    return roles


def _named_role(matrix: _Matrix) -> str:
    words = matrix.words
    if words & _DOWN or matrix.name in ("c_proj", "dense_4h_to_h") or (words & {"layer"} and matrix.name.endswith("2")):
        return "down"
    return "up" if words & (_UP | {"gate"}) or matrix.name in ("c_fc", "dense_h_to_4h") else ""


def _matrices(block: nn.Module) -> Iterator[_Matrix]:
    for path, module in block.named_modules():
        if isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if not 2 <= parameter.dim() <= 3 or "bias" in name or name in _STATES:
                continue
            full = f"{path}.{name}" if path else name
            out, inputs = parameter.shape[-2:]
            if is_input_first(block, full):
                out, inputs = inputs, out
            stacked = parameter.dim() == 3 or (name != "weight" and "experts" in path)
            yield _Matrix(path if name == "weight" else full, out, inputs, stacked)


def _highest(matrices: Sequence[_Matrix]) -> list[_Matrix]:
    """Those that lie highest in the tree: an indexer or an adapter further down has projections of the same names."""
    depth = min((matrix.path.count(".") for matrix in matrices), default=0)
    return [matrix for matrix in matrices if matrix.path.count(".") == depth]


def _letters(name: str) -> str:
    words = _words(name)
    if words >= {"c", "attn"} or "qkv" in words:
        return "qkv"
    found = {_LETTERS[word] for word in words if word in _LETTERS} | (set("kv") if "kv" in words else set())
    return "".join(sorted(found, key="qkv".index))


def _words(name: str) -> set[str]:
    """ "Wqkv" -> qkv;  "kv_a_proj_with_mqa" -> kv, a, proj, with, mqa;  "MiniMaxLightningAttention" -> mini, max, ..."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return {re.sub(r"^w(?=(q|k|v|o|qkv|kv)$)", "", word) for word in re.findall(r"[^\W_]+", spaced.lower())}


def _is_router(name: str) -> bool:
    return name in ("gate", "gating", "switch") or "router" in _words(name)


def _is_norm(words: Collection[str]) -> bool:
    return any(word.endswith("norm") for word in words)


def _without_common_start(name: str, other: str) -> str:
    """ "KimiLinearDeltaAttention", "KimiLinearDecoderLayer" -> "DeltaAttention": model names say nothing."""
    split = [re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z0-9]*|[a-z0-9]+", text) for text in (name, other)]
    while all(split) and split[0][0] == split[1][0] and len(split[0]) > 1:
        split = [split[0][1:], split[1][1:]]
    return "".join(split[0])
