"""What the benchmarks share: models, a training loop, interleaved timing, memory, the machine.

`timing` and `models` import nothing but torch, so that they run in the environments of the peers.
"""
