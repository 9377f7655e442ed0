"""What the notebooks find when pytest runs them: the sample story, and no network."""

import os
from pathlib import Path

STORY = Path(__file__).parent.parent / "willows_kd" / "assets" / "sample_story.txt"
DEAD_END = "http://127.0.0.1:9"  # nothing listens on the discard port

os.environ.setdefault("WILLOWS_KD_CORPUS", str(STORY))
os.environ.update(HF_HUB_OFFLINE="1", HTTPS_PROXY=DEAD_END, HTTP_PROXY=DEAD_END)
os.environ["NO_PROXY"] = "localhost,127.0.0.1"  # this machine is no network
