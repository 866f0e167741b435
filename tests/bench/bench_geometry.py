"""Greedy simplex growth: incremental heights against a determinant per candidate.

Run by `launch/bench geometry`. The baseline computes the Cayley-Menger determinant of every
candidate simplex at every step; it is timed on a few candidates and extrapolated.
"""

import time

import torch

from dist_tl.methods.geometry.anchors import AnchorChunk, choose_anchors
from dist_tl.methods.geometry.item_labels import Anchors, LabelConfig, label_items
from dist_tl.methods.geometry.simplex import cayley_menger_log_content

N, D, M = 1000, 256, 24
PEER_CANDIDATES = 20  # of N candidates, per step


def points(count, width=D, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=rng, dtype=torch.float64)


def seconds(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def determinants(p, chosen):
    """Returns seconds of one determinant per candidate, extrapolated from PEER_CANDIDATES."""
    total = 0.0
    for step in range(1, len(chosen)):
        vertices = p[chosen[:step]]

        def one_step(vertices=vertices):
            for candidate in p[:PEER_CANDIDATES]:
                simplex = torch.cat([vertices, candidate[None]])
                cayley_menger_log_content(torch.cdist(simplex, simplex).square()[None] + 1e-9)

        total += seconds(one_step) * len(p) / PEER_CANDIDATES
    return total


def main():
    torch.set_num_threads(1)
    p = points(N)
    choose_anchors([AnchorChunk(p, 0)], M)  # warm-up
    ours = min(seconds(lambda: choose_anchors([AnchorChunk(p, 0)], M)) for _ in range(5))
    theirs = determinants(p, choose_anchors([AnchorChunk(p, 0)], M))
    print(f"choose {M} of {N} points of {D} numbers, one thread")
    print(f"incremental heights          {ours:8.4f} s")
    print(
        f"a determinant per candidate  {theirs:8.4f} s (from {PEER_CANDIDATES} candidates per step)"
    )
    print(f"ratio {theirs / ours:.0f}x")
    anchors, config = Anchors.of(points(14, 64, seed=1)), LabelConfig()
    print("label items, 14 anchors of 64 numbers, m = 3, in chunks of 8192")
    for count in (1_000, 10_000, 100_000, 1_000_000):
        chunk = points(min(count, 8192), 64, seed=2)
        times = -(-count // len(chunk))
        took = seconds(lambda c=chunk, t=times: [label_items(c, anchors, config) for _ in range(t)])
        print(
            f"  n = {count:9,}  {took:8.3f} s  {1e6 * took / (times * len(chunk)):.2f} us per item"
        )
    for m in (1, 3, 6, 12):
        chunk = points(8192, 64, seed=2)
        took = seconds(lambda c=chunk, m=m: label_items(c, anchors, LabelConfig(m=m)))
        print(f"  m = {m:2d}  {1e6 * took / len(chunk):.2f} us per item")


if __name__ == "__main__":
    main()
