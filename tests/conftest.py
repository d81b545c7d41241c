"""The tests look nothing up on a hub: a name that is not there must fail at once, not after the client's retries.

One thread: the models are tiny, and threads of several processes on two cores wait for each other.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
