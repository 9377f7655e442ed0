"""Every decoder family of `transformers`: can students be made of it, and are they right?

    python tests/families.py > docs/families.md

The list of families is that of the installed `transformers`. Each gets a random teacher
of four layers, as small as its config allows, which is cut to its first and last.
"""

import copy
import inspect
import re
import sys
import tempfile
import warnings
from collections import Counter

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import willows_kd as kd
from willows_kd.losses import forward_kl
from willows_kd.models import quiet_transformers
from willows_kd.students import layer_stack

DEPTH, KEPT, VOCABULARY, LARGEST = 4, [0, 3], 96, 1e7
IDS = torch.arange(1, 17).view(2, 8) * 37 % VOCABULARY
RIGHT, REFUSED, UNBUILT = "right", "refused", "not tried"
SMALL = [  # the first pattern that matches a setting's name gives its value
    (r"vocab_size$|^vocab_size_per_layer_input$", VOCABULARY),
    (r"pad_token_id$", 0),
    (r"token_id$|token_index$", 1),
    (r"experts_per_tok|_topk$|^top_?k|moe_k$|num_selected|topk_group|n_group", 1),
    (r"expert.*(size|dim)", 24),
    (r"n_routed|num_.*experts|n_experts|moe_num_experts|num_local", 4),
    (r"shared_experts", 1),
    (r"first_k_dense|period|interval|_step$|every_n", 2),
    (r"offset", 1),
    (r"(key_value|kv).*heads|multi_query_heads|n_kv|n_groups|num_groups|num_ln_in", 2),
    (r"mamba_n_heads|n_mamba_heads|num_heads_mamba|mamba_num_heads|^num_heads$", 8),
    (r"rotary_dim|head_dim|d_head|qk_.*dim|v_dim|kv_channels|d_kv", 8),
    (r"head", 4),
    (r"rank", 8),
    (r"sliding_window|window_size|attention_window|local_window|chunk", 4),
    (r"position|n_ctx|seq_len|seqlen|max_.*length|context", 64),
    (r"^num_kv_shared_layers$", 0),
    (r"layers?$|n_layer|depth|num_blocks", DEPTH),
    (r"state|d_conv|conv_kernel|expand", 4),
    (r"intermediate|ffn|inner|mlp.*(size|dim)", 48),
    (r"hidden|d_model|n_embd|embed|width|^dim$|lru|emb_dim|d_embed|model_dim", 32),
]


def small(config_class):
    """A config of a family with every size that it has made small, its parts too."""
    defaults = config_class()
    sizes = {}
    for name in inspect.signature(config_class).parameters:
        value = vars(defaults).get(name)
        if isinstance(value, transformers.PreTrainedConfig):
            sizes[name] = small(type(value))
        elif (
            name in ("head_dim", "num_key_value_heads", "num_experts_per_tok")
            or type(value) is int
            and value > 1
        ):
            fits = [size for pattern, size in SMALL if re.search(pattern, name)]
            if fits and (value is None or fits[0] < value or "layer" in name):
                sizes[name] = fits[0]
    if "attention_types" in vars(defaults):  # of GPT-Neo
        sizes["attention_types"] = [[["global", "local"], DEPTH // 2]]
    if "kv_lora_rank" in sizes:  # latent attention has as many keys as queries
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    if hasattr(defaults, "is_decoder"):
        sizes["is_decoder"] = True
    return config_class(**sizes)


def random_teacher(family: str):
    """A small teacher with noise on every weight, so that no two layers are alike."""
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(0)
        config = small(CONFIG_MAPPING[family])
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(copy.deepcopy(config)).num_parameters()
        if size > LARGEST:
            raise ValueError(f"{size / 1e6:.0f} million parameters")
        teacher = AutoModelForCausalLM.from_config(config).float().eval()
        for weight in teacher.parameters():
            weight.data += 0.05 * torch.randn_like(weight)
    shape = logits(teacher).shape
    if shape != (*IDS.shape, VOCABULARY) or not logits(teacher).isfinite().all():
        raise ValueError("it gives no finite logits for token ids alone")
    return teacher


def logits(model) -> torch.Tensor:
    """What a model says of a few tokens."""
    with torch.no_grad(), quiet_transformers():
        return model(IDS, use_cache=False).logits


def cut_by_hand(teacher):
    """A teacher whose other layers are taken out of its own list, and out of its config's lists."""
    cut = copy.deepcopy(teacher)
    stack = layer_stack(cut)
    parent, _, name = stack.rpartition(".")
    layers = cut.get_submodule(stack)
    setattr(cut.get_submodule(parent), name, torch.nn.ModuleList(layers[i] for i in KEPT))
    settings = vars(cut.config.get_text_config(decoder=True))
    for key, value in settings.items():
        if isinstance(value, list) and len(value) == DEPTH:
            settings[key] = [value[i] for i in KEPT]
        elif key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"):
            settings[key] = len(KEPT)
    return cut


def outcome(family: str) -> tuple[str, str]:
    """What became of a family: right, refused or not tried, and why.

    Raises:
        AssertionError: a student was made, and is wrong.
    """
    try:
        teacher = random_teacher(family)
    except Exception as error:  # of a family's own code, given sizes that it does not like
        return UNBUILT, " ".join(str(error).split())[-90:]
    try:
        student, whole = (kd.student_from_teacher(teacher, init=i) for i in (KEPT, range(DEPTH)))
    except kd.InputError as error:
        return REFUSED, re.sub("^no student of .* teacher: ", "", str(error))
    student.eval()
    assert_same(logits(student), logits(reloaded(student)), "saved and loaded")
    assert_same(logits(student), logits(cut_by_hand(teacher)), "cut by hand")
    loss = forward_kl(logits(whole.eval()), logits(teacher)).item()
    assert abs(loss) < 1e-6, f"a full copy starts at a loss of {loss:.2g}"
    return RIGHT, ""


def assert_same(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    """Logits that differ by rounding alone."""
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    error = ((a - b).norm() / b.norm()).item()
    assert error < 1e-4, f"{what}: logits differ by {error:.2g} of their size"


def reloaded(student):
    """A student, saved and loaded again."""
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        student.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


PAGE = """# Families of decoders

Made by `python tests/families.py > docs/families.md`, with `transformers` {version}: a random \
teacher of four layers of each of the {count} model types that it lists as causal language models, \
cut to its first and last layer.

- **{right} right**: the student gives the logits of its teacher with the other layers taken out, \
saved and loaded again too; a full copy starts at a loss of 0.
- **{refused} refused**: `student_from_teacher` says in one line why it cannot.
- **{untried} not tried**: no small decoder can be made from their config alone.

| model type | outcome | why |
|---|---|---|
{rows}"""


def main() -> None:
    """Try all families, and print the page."""
    outcomes = {}
    for family in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        outcomes[family] = outcome(family)
        print(family, *outcomes[family], file=sys.stderr, flush=True)
    counts = Counter(verdict for verdict, _ in outcomes.values())
    rows = (f"| {name} | {it} | {why.replace('|', '/')} |" for name, (it, why) in outcomes.items())
    print(
        PAGE.format(
            version=transformers.__version__,
            count=len(outcomes),
            right=counts[RIGHT],
            refused=counts[REFUSED],
            untried=counts[UNBUILT],
            rows="\n".join(rows),
        )
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
