"""What tests and notebooks share: the workers of pytest-xdist divide the cores among them."""

import os

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

# Read by torch when it is imported, here and in the kernels and processes that tests start.
if WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))
