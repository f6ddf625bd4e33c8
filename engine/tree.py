"""Rows of tokens as one tree, in which what several of them begin with stands once.

    [schema | question 1 | its completions … | question 2 | its completions … | another schema | …]

A node is a run of tokens. It sees itself, causally, and all of the nodes above it. What is below a node follows it at
once, so a token is seen from its own place up to the end of what is below its node. Rows are compared by their tokens,
so copies of a prompt are one prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

LEAST = 16  # tokens that a node has to save: it costs a few operations a layer, about as much as so many tokens


@dataclass
class Node:
    """A run of tokens, as places in the tree."""

    start: int
    stop: int
    end: int  # of what is below it
    depth: int  # position of its first token in the rows


class Tree:
    """The prefix tree of rows of tokens.

    nodes: in the order of their places, which they fill without a gap.
    size: tokens of all nodes together, L.
    order: of the rows, as they stand in the tree.
    added: of each row, its tokens that are in no row before it in this order.
    places: of each row, where its tokens are. N times [len(row)]
    """

    def __init__(self, rows: Sequence[Tensor], least: int | None = None):
        self.rows, self.least = [row.tolist() for row in rows], LEAST if least is None else least
        self.order = sorted(range(len(rows)), key=self.rows.__getitem__)
        self.nodes: list[Node] = []
        self.size, self.placed = 0, 0  # placed: what the size was when the newest row ended
        self.added, self.places = [0] * len(rows), [torch.empty(0)] * len(rows)
        if self.rows:
            self._grow(self.order, 0, 0, [])

    def _grow(self, rows: Sequence[int], alike: int, done: int, above: list[range]) -> None:
        """Adds rows, sorted, that begin with `alike` tokens in common, of which `done` are in the runs `above`."""
        first, last, node = self.rows[rows[0]], self.rows[rows[-1]], None
        while alike < min(len(first), len(last)) and first[alike] == last[alike]:
            alike += 1
        same = alike == len(last)  # all of the rows, to their ends
        if alike > done and (same or (alike - done) * (len(rows) - 1) >= self.least):
            node = Node(self.size, self.size + alike - done, 0, done)
            self.nodes.append(node)
            above, self.size, done = [*above, range(node.start, node.stop)], node.stop, alike
        for token, branch in groupby(rows, key=lambda i: self.rows[i][alike:alike + 1]):
            if token or done < alike:
                self._grow(list(branch), alike, done, above)
                continue
            for i in branch:  # they end here
                self.places[i] = torch.cat([torch.arange(run.start, run.stop) for run in above])
                self.added[i], self.placed = self.size - self.placed, self.size
        if node:
            node.end = self.size

    def ids(self, rows: Sequence[Tensor]) -> Tensor:
        """The tokens of the rows as they stand in the tree. N times [len(row)] -> [1, L]"""
        ids = torch.empty(self.size, dtype=torch.long)
        for row, places in zip(rows, self.places, strict=True):
            ids[places] = row.cpu()
        return ids[None]
