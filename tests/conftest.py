"""The tests look nothing up on a hub: a name that is not there must fail at once, not after the client's retries."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
