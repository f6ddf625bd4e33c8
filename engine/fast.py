"""The fast engine: what `grpo.PLAIN` computes, with each prompt computed once for its group (decoding.py, packing.py).

A model that cannot be run so takes the plain engine, with one warning.
"""

from engine.decoding import decode
from engine.packing import logprobs
from grpo import PLAIN, Engine

FAST = Engine(decode, logprobs)
ENGINES = {"fast": FAST, "plain": PLAIN}
