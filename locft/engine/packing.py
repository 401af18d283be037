"""Rows of different lengths as few dense sequences, computing every shared prefix once.

Legend: U unique tokens, G sequences of a pack, N tokens of a sequence, K supervised tokens.

A hidden state depends on the tokens up to its own and on nothing else. So rows with a common beginning (the choices of
one question, the two sentences of a minimal pair) share its states: the rows form a tree, a node is a token after a
particular beginning, and a row is a path in it. A pack lays paths side by side into sequences of a bounded length; the
mask lets a token see its own path only, so nothing is padded but the sequences' ends, and what rounds their width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from locft.train.encoding import TokenRow

STEP = 8
"""Sequences are as wide as a multiple of it: for every new shape of a product oneDNN compiles a kernel, which takes as long
as ten such products. A training draws new batches in every step; rounded, they come in some ten shapes instead of 150."""


class PrefixTree:
    """All token rows of a workbench. Nodes are numbered from 0 in the order of their first row."""

    def __init__(self, rows: Sequence[TokenRow]):
        nodes: dict[tuple[int, int], int] = {}
        tokens, depths = [], []
        self._paths: dict[tuple[int, ...], np.ndarray] = {}
        for row in rows:
            if row.token_ids in self._paths:
                continue
            path, node = [], -1
            for depth, token in enumerate(row.token_ids):
                key = (node, token)
                if key not in nodes:
                    nodes[key] = len(tokens)
                    tokens.append(token)
                    depths.append(depth)
                node = nodes[key]
                path.append(node)
            self._paths[row.token_ids] = np.array(path)
        self.token_ids = np.array(tokens, dtype=np.int64)  # (U,)
        self.depths = np.array(depths, dtype=np.int64)  # (U,) position of the token in its rows, from 0

    def __len__(self) -> int:
        return len(self.token_ids)

    def __contains__(self, row: TokenRow) -> bool:
        return row.token_ids in self._paths

    def path(self, row: TokenRow) -> np.ndarray:
        """Nodes of a row's tokens, (T,). KeyError for a row that is not in the tree."""
        return self._paths[row.token_ids]

    def predicting(self, row: TokenRow) -> np.ndarray:
        """Nodes of the tokens before the row's supervised ones, (K,)."""
        return self._paths[row.token_ids][row.start - 1 : -1]


@dataclass(frozen=True)
class Pack:
    """Rows laid into dense sequences."""

    nodes: torch.Tensor  # (G, N) int64, -1 behind a sequence's end
    position_ids: torch.Tensor  # (G, N) int64
    visible: torch.Tensor | None  # (G, 1, N, N) bool: may the token of this line see that of this column?
    """None where every row has a sequence of its own: there it is what the model sees by itself."""
    sequence: torch.Tensor  # (K,) int64, for each supervised token, rows in the order given:
    place: torch.Tensor  # (K,) int64, sequence and place of the token before it, which predicts it

    def attention_mask(self, dtype: torch.dtype) -> torch.Tensor:
        """(G, 1, N, N), 0 where visible and the type's lowest number elsewhere; for single rows (G, N) of 1 and 0."""
        if self.visible is None:
            return (self.nodes >= 0).long()
        return torch.zeros(self.visible.shape, dtype=dtype).masked_fill_(~self.visible, torch.finfo(dtype).min)

    def asked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The distinct places of supervised tokens in each sequence, (G, Q), ends filled with 0, and for each of the K
        supervised tokens which of them is its own, (K,)."""
        width = self.nodes.shape[1]
        distinct, own = np.unique((self.sequence * width + self.place).numpy(), return_inverse=True)
        sequence = distinct // width
        rank = np.arange(len(distinct)) - np.searchsorted(sequence, sequence)
        places = np.zeros((len(self.nodes), _rounded(rank.max() + 1)), dtype=np.int64)
        places[sequence, rank] = distinct % width
        return torch.from_numpy(places), torch.from_numpy(rank[own])


def pack_rows(tree: PrefixTree, rows: Sequence[TokenRow], limit: int) -> Pack:
    """Lay rows into sequences of about `limit` tokens, evenly filled; results come in the order given.

    Rows with a common beginning go into one sequence, which holds that beginning once. With limit 0 every row has a sequence
    of its own, for models whose attention takes no mask of ours.
    """
    paths = [tree.path(row) for row in rows]
    if limit == 0:
        return _pack(tree, rows, [path.tolist() for path in paths], [(i, np.arange(len(p))) for i, p in enumerate(paths)], None)
    bundles = _bundles(paths)
    total = sum(len(bundle.nodes) for bundle in bundles)
    sequences: list[list[int]] = [[] for _ in range(max(1, round(total / limit)))]
    where = [(0, paths[0])] * len(rows)
    seen: list[tuple[int, np.ndarray, int]] = []  # sequence, places of a row's tokens, how many of them are shared
    for bundle in sorted(bundles, key=lambda b: -len(b.nodes)):
        number = min(range(len(sequences)), key=lambda n: len(sequences[n]))
        start = len(sequences[number])
        sequences[number].extend(bundle.nodes)
        for index, places, shared in bundle.rows:
            where[index] = (number, places + start)
            seen.append((number, places + start, shared))
    sequences = [sequence for sequence in sequences if sequence]
    longest = _rounded(max(map(len, sequences)))
    visible = np.zeros((len(sequences), longest, longest), dtype=bool)
    for number, line, shared in seen:
        visible[number, line[shared:, None], line[None, :]] = np.tri(len(line) - shared, len(line), shared, dtype=bool)
    for number, sequence in enumerate(sequences):
        ends = np.arange(len(sequence), longest)
        visible[number, ends, ends] = True  # a line that sees nothing would be NaN
    return _pack(tree, rows, sequences, where, visible[:, None])


def _rounded(width: int) -> int:
    return -(-width // STEP) * STEP


@dataclass
class _Bundle:
    """Rows with a common beginning: the nodes of all, and for each row its index, its places in them, how many shared."""

    nodes: list[int]
    rows: list[tuple[int, np.ndarray, int]]


def _bundles(paths: Sequence[np.ndarray]) -> list[_Bundle]:
    """Rows side by side in the order of their paths, cut where two neighbours share less than half of the shorter one."""
    bundles: list[_Bundle] = []
    before, places = paths[0][:0], paths[0][:0]
    for index in sorted(range(len(paths)), key=lambda i: paths[i].tolist()):
        path = paths[index]
        shared = _common(before, path)
        if not bundles or 2 * shared < min(len(before), len(path)):
            bundles.append(_Bundle([], []))
            shared = 0
        bundle = bundles[-1]
        places = np.concatenate([places[:shared], np.arange(len(bundle.nodes), len(bundle.nodes) + len(path) - shared)])
        bundle.nodes.extend(path[shared:].tolist())
        bundle.rows.append((index, places, shared))
        before = path
    return bundles


def _pack(
    tree: PrefixTree,
    rows: Sequence[TokenRow],
    sequences: Sequence[Sequence[int]],
    where: Sequence[tuple[int, np.ndarray]],
    visible: np.ndarray | None,
) -> Pack:
    width = max(map(len, sequences)) if visible is None else visible.shape[-1]
    nodes = np.full((len(sequences), width), -1, dtype=np.int64)
    for number, sequence in enumerate(sequences):
        nodes[number, : len(sequence)] = sequence
    predicting = [line[row.start - 1 : -1] for row, (_, line) in zip(rows, where, strict=True)]
    sequence_of = np.repeat([number for number, _ in where], [len(line) for line in predicting])
    return Pack(
        torch.from_numpy(nodes),
        torch.from_numpy(np.where(nodes >= 0, tree.depths[nodes], 0)),
        None if visible is None else torch.from_numpy(visible),
        torch.from_numpy(sequence_of.astype(np.int64)),
        torch.from_numpy(np.concatenate(predicting).astype(np.int64)),
    )


def _common(one: np.ndarray, other: np.ndarray) -> int:
    length = min(len(one), len(other))
    different = np.nonzero(one[:length] != other[:length])[0]
    return int(different[0]) if len(different) else length
