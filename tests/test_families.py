"""Each family of decoders that `transformers` has: its students are right, or refused in a line."""

import pytest
from families import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, REFUSED, RIGHT, UNBUILT, outcome

ALWAYS = {  # each for what sets its layers apart
    "bart": RIGHT,  # a decoder taken from an encoder-decoder
    "llama": RIGHT,
    "opt": RIGHT,
    "recurrent_gemma": RIGHT,  # kinds of layer as a property of its config
    "smollm3": RIGHT,  # positions in some layers only
    "gpt_neo": RIGHT,  # kinds of attention, written as patterns and counts
    "jamba": RIGHT,  # periods and offsets
    "deepseek_v3": REFUSED,  # the first layers dense, the others mixtures of experts
    "llama4_text": REFUSED,  # lists of layer numbers
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
