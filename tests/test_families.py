"""Each family of decoders that `transformers` has: its students are right, or refused in a line."""

import pytest
from families import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, REFUSED, RIGHT, UNBUILT, outcome

ALWAYS = {  # each for what sets its layers apart
    "bart": RIGHT,  # a decoder taken from an encoder-decoder
    "llama": RIGHT,
    "smollm3": RIGHT,  # positions in some layers only
    "deepseek_v3": REFUSED,  # the first layers dense, the others mixtures of experts
}
FAMILIES = [
    pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow)
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_a_family_is_right_or_refused_in_one_line(family):
    verdict, why = outcome(family)
    if verdict == UNBUILT:
        pytest.skip(why)
    assert verdict in (RIGHT, REFUSED)
    assert verdict == ALWAYS.get(family, verdict)
    assert "\n" not in why
    assert len(why) < 300
