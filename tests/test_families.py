"""Each family of decoders that `transformers` has: its students are right, or refused in a line."""

import pytest
from families import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, REFUSED, RIGHT, UNBUILT, outcome

ALWAYS = {  # each for what sets its layers apart
    "bart",  # a decoder taken from an encoder-decoder
    "deepseek_v3",  # the first layers dense, the others mixtures of experts
    "gpt_neo",  # kinds of attention, written as patterns and counts
    "jamba",  # periods and offsets
    "llama4_text",  # lists of layer numbers
    "opt",  # dropout without modules
    "qwen3_moe",  # every so many layers
    "recurrent_gemma",  # kinds of layer as a property of its config
    "smollm3",  # positions in some layers only
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
    assert verdict == RIGHT or family not in ALWAYS
    assert verdict in (RIGHT, REFUSED)
    assert "\n" not in why
    assert len(why) < 300
