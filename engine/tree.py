"""Rows of tokens as a prefix tree, in which a common prefix appears once.

    [schema | question 1 | its completions … | question 2 | its completions … | another schema | …]

A node is a run of tokens. It sees itself, causally, and all of its ancestors. Its descendants follow it directly, so a
token is visible from its own place up to the end of its node's descendants. Rows are compared by their tokens, so
copies of a prompt are one prompt.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = 16  # tokens that a node must save: it costs a few operations per layer, about as much as this many tokens


@dataclass
class Node:
    """A run of tokens, as places in the tree."""

    start: int
    stop: int
    end: int  # of its descendants
    depth: int  # position of its first token in the rows


class Tree:
    """The prefix tree of rows of tokens.

    nodes: in the order of their places, which they fill without a gap.
    size: tokens of all nodes together, L.
    order: indices of the rows, as they follow one another in the tree.
    added: per row, the number of its tokens that are in no row before it in this order.
    places: per row, the places of its tokens. N times [len(row)]
    """

    def __init__(self, rows: Sequence[Tensor], least: int | None = None):
        self.rows, self.least = [row.tolist() for row in rows], LEAST if least is None else least
        self.order = sorted(range(len(rows)), key=self.rows.__getitem__)
        self.nodes: list[Node] = []
        self.size, self.placed = 0, 0  # placed: the size when the newest row ended
        self.added, self.places = [0] * len(rows), [torch.empty(0, dtype=torch.long)] * len(rows)
        self._grow()

    def _grow(self) -> None:
        """Adds all rows. A stack replaces recursion, because thousands of rows may each extend the one before.

        The stack holds (begin, end, alike, above): rows order[begin:end] share a prefix of `alike` tokens, the first of
        which are in the tree at the places `above`. It also holds nodes, whose `end` is set after their descendants
        are added.
        """
        stack = [(0, len(self.order), 0, torch.empty(0, dtype=torch.long))] if self.order else []
        while stack:
            task = stack.pop()
            if isinstance(task, Node):
                task.end = self.size
                continue
            begin, end, alike, above = task
            first, last = self.rows[self.order[begin]], self.rows[self.order[end - 1]]
            while alike < min(len(first), len(last)) and first[alike] == last[alike]:
                alike += 1
            fresh, same = alike - len(above), alike == len(last)  # same: all rows are equal
            if fresh and (same or fresh * (end - begin - 1) >= self.least):
                node = Node(self.size, self.size + fresh, 0, len(above))
                self.nodes.append(node)
                stack.append(node)
                above, self.size = torch.cat([above, torch.arange(node.start, node.stop)]), node.stop
            while len(above) == alike and begin < end and len(self.rows[self.order[begin]]) == alike:  # ends here
                self.places[self.order[begin]] = above
                self.added[self.order[begin]], self.placed = self.size - self.placed, self.size
                begin += 1
            stack += [(*branch, alike, above) for branch in reversed(self._branches(begin, end, alike))]

    def _branches(self, begin: int, end: int, alike: int) -> list[tuple[int, int]]:
        """The parts of rows order[begin:end] that share the token after the first `alike`."""
        found = []
        while begin < end:
            token = self.rows[self.order[begin]][alike:alike + 1]
            stop = bisect_right(self.order, token, begin, end, key=lambda i: self.rows[i][alike:alike + 1])
            found.append((begin, stop))
            begin = stop
        return found

    def ids(self, rows: Sequence[Tensor]) -> Tensor:
        """The tokens of the rows in the order of the tree. N times [len(row)] -> [1, L]"""
        ids = torch.empty(self.size, dtype=torch.long)
        for row, places in zip(rows, self.places, strict=True):
            ids[places] = row.cpu()
        return ids[None]
