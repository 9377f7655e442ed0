"""Learn knowledge distillation of language models by doing it: `import willows_kd as kd`.

The public names, in the order in which the notebooks meet them. Each is imported from
its file when it is first used, so that `import willows_kd` and `--help` stay quick.
"""

import importlib

__version__ = "0.1.0"

PUBLIC_NAMES = {
    "sources.load": "load_corpus",
    "texts": "Corpus",
    "corpus": "split pack Blocks",
    "models": (
        "load_teacher load_bundled bundled_history stored_results load_student fingerprint "
        "save_model"
    ),
    "compress.layers": "block_influence choose_layers",
    "compress.width": "importance narrowed",
    "students": "student_from_teacher",
    "generation": "complete sample_continuations",
    "sources.transfer_set": "make_transfer_set text_quality",
    "losses": (
        "soften entropy top_k forward_kl reverse_kl jensen_shannon total_variation "
        "hard_label_loss cosine_distance shift"
    ),
    "config": "DistillConfig check_dial",
    "distillation": "distill epoch_batches parameter_groups",
    "scale.checkpoints": "Checkpoints",
    "scale.chunked_loss": "chunked_distillation_loss",
    "scale.linear_head": "ChunkedLoss",
    "scale.processes": "shard_teacher",
    "scale.teacher_cache": "cache_teacher",
    "evaluation": (
        "evaluate loss_by_position copy_gain token_scores block_nll paired_bootstrap "
        "compare as_markdown"
    ),
    "scale.planning": "plan",
    "cost": "latency size_on_disk MemoryWatch",
    "compress.quantization": "fake_quantize quantized quantized_size",
    "compress.export": "export_model load_onnx",
    "compress.speculative": "speculative_decode decode_latency expected_tokens expected_speedup",
    "figures.plots": (
        "plot_bars plot_dots plot_lines plot_scatter plot_heatmaps plot_tokens token_table curves"
    ),
    "figures.explorers": "explore_temperature explore_tokens prompt_box",
    "errors": "InputError Stopped",
}
HOME = {name: file for file, names in PUBLIC_NAMES.items() for name in names.split()}
__all__ = list(HOME)


def __getattr__(name: str):
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *__all__])
