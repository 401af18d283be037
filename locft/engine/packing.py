"""Packing of rows of different lengths into few dense sequences, so that every shared prefix is computed once.

Legend: U unique tokens, G sequences of a pack, N tokens of a sequence, K supervised tokens.

A hidden state depends only on the tokens up to its own. So rows with a common prefix (the choices of one question, the
two sentences of a minimal pair) share its states: the rows form a tree, a node is a token after a particular prefix,
and a row is a path. A pack lays paths side by side into sequences of bounded length. Its mask lets a token see only
its own path, so only the ends of the sequences are padded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from locft.process import moved
from locft.train.token_rows import TokenRow

_CPU = torch.device("cpu")
STEP = 8
"""The width of a sequence is a multiple of this. For every new product shape, oneDNN compiles a kernel, which takes as long
as ten such products; with rounding, the batches of a training come in about ten shapes instead of 150."""
TOKEN_COST = 1000
"""Passing a token through a layer costs about as much as this many attention scores: on CPUs 400 (bfloat16) to 1000
(float32) at a width of 576, proportional to the width."""


class PrefixTree:
    """All token rows of a workbench. Nodes are numbered from 0 in the order in which rows first need them."""

    def __init__(self, rows: Sequence[TokenRow]):
        nodes: dict[tuple[int, int], int] = {}  # (node of the token before, token) -> node
        self._paths: dict[tuple[int, ...], np.ndarray] = {}
        for ids in dict.fromkeys(row.token_ids for row in rows):
            path = [-1]
            for token in ids:
                path.append(nodes.setdefault((path[-1], token), len(nodes)))
            self._paths[ids] = np.array(path[1:])
        self.token_ids = np.array([token for _, token in nodes], dtype=np.int64)  # (U,)
        self.depths = np.empty(len(nodes), dtype=np.int64)  # (U,) position of the token in its rows, from 0
        for places in self._paths.values():
            self.depths[places] = np.arange(len(places))

    @property
    def rows(self) -> list[TokenRow]:
        """The rows of the tree, each once, with all tokens but the first supervised."""
        return [TokenRow(ids, 1) for ids in self._paths]

    def __len__(self) -> int:
        return len(self.token_ids)

    def __contains__(self, row: TokenRow) -> bool:
        return row.token_ids in self._paths

    def path(self, row: TokenRow) -> np.ndarray:
        """Nodes (T,) of a row's tokens. Raises KeyError for a row that is not in the tree."""
        return self._paths[row.token_ids]

    def predicting(self, row: TokenRow) -> np.ndarray:
        """Nodes (K,) of the tokens before the row's supervised ones."""
        return self._paths[row.token_ids][row.start - 1 : -1]


@dataclass(frozen=True)
class Pack:
    """Rows laid into dense sequences, on the CPU."""

    nodes: torch.Tensor  # (G, N) int64, -1 past a sequence's end
    token_ids: torch.Tensor  # (G, N) int64
    position_ids: torch.Tensor  # (G, N) int64
    visible: torch.Tensor | None  # (G, 1, N, N) bool: may the token of this line see the token of this column?
    """None if every row has a sequence of its own: the model's own causal mask then applies."""
    sequence: torch.Tensor  # (K,) int64, for each supervised token, rows in the order given: sequence
    place: torch.Tensor  # (K,) int64, and place in it of the token before, which predicts it

    def attention_mask(self, dtype: torch.dtype, device: torch.device = _CPU) -> torch.Tensor:
        """(G, 1, N, N), 0 where visible and the dtype's lowest number elsewhere. For single rows, (G, N) of 1 and 0."""
        if self.visible is None:
            return moved((self.nodes >= 0).long(), device)
        visible = moved(self.visible, device)  # one byte per entry: copying this is cheaper than copying the mask
        return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, torch.finfo(dtype).min)

    def inputs(self, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Attention mask, position ids and token ids."""
        return self.attention_mask(dtype, device), moved(self.position_ids, device), moved(self.token_ids, device)


def pack_rows(tree: PrefixTree, rows: Sequence[TokenRow], limit: int) -> Pack:
    """Lay rows into sequences of about `limit` tokens, evenly filled.

    Rows with a common prefix go into one sequence, which holds that prefix once. With limit 0 every row has a sequence
    of its own, for models whose attention does not accept our masks.
    """
    paths = [tree.path(row) for row in rows]
    if limit == 0:
        alone = [(index, np.arange(len(path)), 0) for index, path in enumerate(paths)]
        return _pack(tree, rows, [path.tolist() for path in paths], alone, None)
    groups = sorted(_prefix_groups(paths), key=lambda group: -len(group.nodes))
    sequences: list[list[int]] = []
    where = [(0, paths[0], 0)] * len(rows)
    for number, together in enumerate(_evenly([len(group.nodes) for group in groups], limit)):
        sequences.append([])
        for group in (groups[place] for place in together):
            start = len(sequences[-1])
            sequences[-1].extend(group.nodes)
            for index, places, shared in group.rows:
                where[index] = (number, places + start, shared)
    longest = _rounded(max(map(len, sequences)))
    visible = np.zeros((len(sequences), longest, longest), dtype=bool)
    for number, line, shared in where:
        visible[number, line[shared:, None], line[None, :]] = np.tri(len(line) - shared, len(line), shared, dtype=bool)
    for number, sequence in enumerate(sequences):
        ends = np.arange(len(sequence), longest)
        visible[number, ends, ends] = True  # a token that sees nothing would give NaN
    return _pack(tree, rows, sequences, where, visible[:, None])


def _evenly(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Distribute groups of these sizes, largest first, over sequences of about `limit` tokens; returns their indices. If one is
    larger than that, the other sequences would be mostly padding: then there are fewer and wider ones, as costs least."""
    total, wide = sum(sizes), max(limit, *sizes)
    counts = range(max(1, round(total / wide)), max(1, round(total / limit)) + 1)
    return min((_filled(sizes, count) for count in counts), key=lambda found: _cost(found, sizes))


def _filled(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Put each group into the sequence that is the shortest so far."""
    sequences: list[list[int]] = [[] for _ in range(count)]
    lengths = [0] * count
    for place, size in enumerate(sizes):
        number = lengths.index(min(lengths))
        sequences[number].append(place)
        lengths[number] += size
    return [sequence for sequence in sequences if sequence]


def _cost(sequences: Sequence[Sequence[int]], sizes: Sequence[int]) -> int:
    """Cost of a layer, in attention scores."""
    width = _rounded(max(sum(sizes[place] for place in sequence) for sequence in sequences))
    return len(sequences) * width * (width + TOKEN_COST)


def _rounded(width: int) -> int:
    return -(-width // STEP) * STEP


@dataclass
class _PrefixGroup:
    """Rows with a common prefix: the nodes of all; for each row its index, its places, and how many of these are shared."""

    nodes: list[int]
    rows: list[tuple[int, np.ndarray, int]]


def _prefix_groups(paths: Sequence[np.ndarray]) -> list[_PrefixGroup]:
    """Rows in the order of their paths, split where two neighbours share less than half of the shorter one, and where a
    group is full.

    A token's scores cover its whole sequence, its own path or not. So n tokens after a prefix of p cost n * (p + n) attention
    scores, and the prefix costs p * `TOKEN_COST` once per group: the sum per token is least at n = sqrt(p * TOKEN_COST).
    """
    groups: list[_PrefixGroup] = []
    before, places = paths[0][:0], paths[0][:0]
    for index in sorted(range(len(paths)), key=lambda i: paths[i].tolist()):
        path = paths[index]
        shared = _common(before, path)
        full = groups and len(groups[-1].nodes) >= shared + math.sqrt(shared * TOKEN_COST)
        if not groups or full or 2 * shared < min(len(before), len(path)):
            groups.append(_PrefixGroup([], []))
            shared = 0
        group = groups[-1]
        places = np.concatenate([places[:shared], np.arange(len(group.nodes), len(group.nodes) + len(path) - shared)])
        group.nodes.extend(path[shared:].tolist())
        group.rows.append((index, places, shared))
        before = path
    return groups


def _pack(
    tree: PrefixTree,
    rows: Sequence[TokenRow],
    sequences: Sequence[Sequence[int]],
    where: Sequence[tuple[int, np.ndarray, int]],
    visible: np.ndarray | None,
) -> Pack:
    """where: of each row its sequence, the places of its tokens, and how many of them are shared with rows before it."""
    width = max(map(len, sequences)) if visible is None else visible.shape[-1]
    nodes = np.full((len(sequences), width), -1, dtype=np.int64)
    for number, sequence in enumerate(sequences):
        nodes[number, : len(sequence)] = sequence
    predicting = [line[row.start - 1 : -1] for row, (_, line, _) in zip(rows, where, strict=True)]
    sequence_of = np.repeat([number for number, *_ in where], [len(line) for line in predicting])
    return Pack(
        torch.from_numpy(nodes),
        torch.from_numpy(tree.token_ids[np.maximum(nodes, 0)]),
        torch.from_numpy(np.where(nodes >= 0, tree.depths[nodes], 0)),
        None if visible is None else torch.from_numpy(visible),
        torch.from_numpy(sequence_of.astype(np.int64)),
        torch.from_numpy(np.concatenate(predicting).astype(np.int64)),
    )


def _common(one: np.ndarray, other: np.ndarray) -> int:
    length = min(len(one), len(other))
    different = np.nonzero(one[:length] != other[:length])[0]
    return int(different[0]) if len(different) else length
