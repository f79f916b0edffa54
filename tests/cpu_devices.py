"""The environment of programs that tests start with several CPU devices each."""

# A thread that waits in a collective is one of a pool that has, unasked, as many threads as there
# are cores or devices. Once all of them wait, some in one collective and some in another that does
# not depend on it, nobody is left to start the one that they wait for.
ON_CPU = {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": "64"}
