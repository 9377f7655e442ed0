"""The figures say what the data say: what was drawn is read back; and the sliders move them."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgba
from transformers import MambaConfig, MambaForCausalLM

import willows_kd as kd
from willows_kd.figures import explorers
from willows_kd.figures.plots import wrap_words


@pytest.fixture
def logits(tokenizer):
    """Teacher and student at one position: four likely tokens each, two in common."""
    p, q = (-6.0 - torch.arange(len(tokenizer)) / 1000).repeat(2, 1)
    p[[300, 301, 302, 303]] = torch.tensor([6.0, 5.0, 4.0, 3.0])
    q[[303, 302, 305, 306]] = torch.tensor([6.0, 5.0, 4.0, 3.0])
    return p, q


def title(figure, i=0):
    return figure.axes[i].get_title(loc="left")


def rows(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def texts(figure, i=0):
    return [text.get_text().strip() for text in figure.axes[i].texts]


def legend(owner):
    return [text.get_text() for text in owner.get_legend().get_texts()]


def test_parts_names_the_share_of_the_layers(make_gpt2):
    figure = kd.plot_parts({"teacher": make_gpt2(4), "student": make_gpt2(2)})
    assert rows(figure) == ["teacher", "student"]
    size = make_gpt2(4).num_parameters()
    assert f"{size / 1e6:.2f} M" in texts(figure)
    assert title(figure).endswith("of the teacher's parameters are in its layers")


def test_split_says_how_many_test_lines_touch_training_lines():
    chapters = ["train"] * 6 + ["validation"] * 2 + ["test"] * 2
    figure = kd.plot_split({"by chapter": chapters, "mixed": ["train", "test"] * 5})
    assert title(figure) == "Test text next to training text: 0% by chapter, 100% mixed"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "train",
        "validation",
        "test",
    ]


def test_perplexities_has_a_number_beside_each_bar():
    measured = {"base": {"train": 60.2, "test": 72.1}, "teacher": {"train": 15.2, "test": 24.1}}
    figure = kd.plot_perplexities(measured)
    assert rows(figure) == ["train", "test"]
    assert texts(figure) == ["60.2", "72.1", "15.2", "24.1"]
    assert title(figure) == "Test perplexity: base 72.1, teacher 24.1"


def test_soft_labels_numbers_stand_at_their_own_bars(logits, tokenizer):
    figure = kd.plot_soft_labels(logits[0], tokenizer, temperature=4.0, written=305)
    soft = kd.soften(logits[0], 4.0)[[*kd.top_k(logits[0]).tokens.tolist(), 305]]
    ends = [text.xy[0] for text in figure.axes[0].texts]
    assert ends == pytest.approx(soft.tolist())
    assert rows(figure)[10].startswith("written (no. ")
    assert title(figure).startswith("T = 4: entropy ")
    rest = figure.axes[0].child_axes[0]
    assert rest.texts[0].get_text().startswith("all others")
    assert rest.patches[0].get_height() == pytest.approx(1 - soft.sum().item(), abs=1e-6)


def test_temperatures_says_how_far_entropy_rises(logits):
    figure = kd.plot_temperatures(logits[0], [1, 2, 20])
    nats = [kd.entropy(kd.soften(logits[0], T)).item() for T in (1, 2, 20)]
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx(nats)
    assert title(figure) == f"Entropy rises from {nats[0]:.1f} to {nats[2]:.1f} nats"
    assert title(figure, 1).startswith("Outside the top ten: ")
    assert figure.get_size_inches()[0] <= 9


def test_gradients_says_how_much_each_changes():
    figure = kd.plot_gradients([1, 2], {"with T²": [3, 2], "without T²": [40, 2]}, {"hard": 1})
    assert title(figure) == "The gradient changes 1.5-fold with T², 20-fold without T²"
    assert legend(figure.axes[0]) == ["with T²", "without T²", "hard"]


def test_two_peaks_names_the_wide_and_the_narrow_fit():
    x = np.linspace(-5, 5, 200)
    wide, narrow = np.exp(-(x**2) / 8), np.exp(-((x - 2) ** 2) / 2)
    figure = kd.plot_two_peaks(x, wide + narrow, {"reverse": narrow, "forward": wide})
    assert title(figure).startswith("Forward covers (width ")
    assert "reverse picks (0.9" in title(figure) or "reverse picks (1.0" in title(figure)


def test_pull_is_minus_the_gradient_of_each_loss(logits, tokenizer):
    teacher, student = logits
    figure = kd.plot_pull(student, teacher, 305, tokenizer)
    z = student.clone().requires_grad_()
    losses = kd.hard_label_loss(z[None], torch.tensor([305])), kd.forward_kl(z[None], teacher[None])
    drawn = [[bar.get_width() for bar in bars] for bars in figure.axes[0].containers]
    for loss, widths in zip(losses, drawn, strict=True):
        pull = -torch.autograd.grad(loss, z)[0]
        assert widths[0] == pytest.approx(pull[305].item(), abs=1e-5)
        assert max(map(abs, widths)) == pytest.approx(pull.abs().max().item(), abs=1e-5)
    assert rows(figure)[0].startswith("written: ")
    up = (kd.soften(teacher) > kd.soften(student)).sum().item()
    assert f"soft labels raise {up:,} of {len(teacher):,}" in title(figure)


def test_starts_and_their_numbers():
    figure = kd.plot_starts({"copied": 312.0, "random": 5000.0}, teacher=24.0, guess=4096.0)
    assert rows(figure) == ["copied", "random"]
    assert texts(figure) == ["312", "5,000", "teacher, 24", "blind guess, 4,096"]
    assert title(figure) == "Best start: copied, 13.0 × the teacher's perplexity"


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([30, 40, 50], "1.00; the best start ends best"),
        ([50, 40, 30], "-1.00; the best start ends behind another"),
    ],
)
def test_choices_of_layers_and_whether_start_and_end_agree(ends, expected):
    init = ["greedy, influence", math.nan, "first"]
    choices = pd.DataFrame({"start": [90.0, 200.0, 3000.0], "end": ends, "init": init})
    figure = kd.plot_choices(choices)
    every, *named = [dots.get_offsets().tolist() for dots in figure.axes[0].collections]
    dots = [list(dot) for dot in zip(choices["start"], ends, strict=True)]
    assert every == dots and named == [dots[:1], dots[2:]]
    assert legend(figure.axes[0]) == ["greedy, influence", "first"]
    assert figure.axes[0].get_xscale() == "log"
    assert title(figure) == f"Rank correlation of start and end {expected}"


def history(*perplexities):
    """Two steps an epoch, validated at the second."""
    return [
        {"step": step, "epoch": 1, "loss": 5.0 / step, "tokens": 500 * step}
        | ({"validation_perplexity": perplexities[step // 2 - 1]} if step % 2 == 0 else {})
        for step in range(1, 2 * len(perplexities) + 1)
    ]


def test_history_starts_with_the_untrained_student():
    figure = kd.plot_history({"soft": history(40, 30), "hard": history(45, 35)}, 24.0, 300.0)
    soft = figure.axes[1].lines[0]
    assert list(soft.get_xdata()) == [0, 2, 4] and list(soft.get_ydata()) == [300, 40, 30]
    assert legend(figure.axes[1]) == ["soft", "hard", "teacher, 24.0"]
    assert title(figure, 1) == "Lowest at the end: soft, 30.0"


def test_a_history_that_was_stopped_early_is_drawn():
    figure = kd.plot_history({"stopped": history(40)[:1]})
    assert title(figure, 1) == "No epoch finished"
    assert len(figure.axes[0].lines) == 1


def test_progress_shows_where_a_minute_stands():
    rows = history(40, 30) + [{"step": 5, "tokens": 2500, "validation_perplexity": math.nan}]
    figure = kd.plot_progress({"a minute": history(60), "full run": rows}, 24.0, 300.0)
    assert title(figure) == "a minute: 60.0 at 0.001 M tokens; full run: 30.0 at 0.002 M tokens"
    assert list(figure.axes[0].lines[2].get_xdata()) == [1000, 2000]
    assert legend(figure.axes[0]) == ["untrained, 300", "a minute", "full run", "teacher, 24.0"]
    assert texts(figure) == ["60.0", "30.0"]


def test_transfer_is_sorted_with_the_best_text_in_the_title():
    table = pd.DataFrame(
        {"ratio": [1.08, 1.03], "low": [1.07, 1.02], "high": [1.09, 1.04]}, ["book", "more books"]
    )
    figure = kd.plot_transfer(table)
    assert rows(figure) == ["more books", "book"]
    assert texts(figure) == ["1.030", "1.080", "teacher"]
    assert title(figure) == "Best: more books, 1.030 × the teacher's perplexity"


@pytest.fixture
def table():
    """What `compare` returns, as far as it is drawn."""
    columns = ["perplexity", "parameters", "disk_mb", "token_ms"]
    data = [[24, 4e6, 16, 4], [300, 2e6, 8, 2], [30, 2e6, 8, 2]]
    return pd.DataFrame(data, ["teacher", "untrained", "soft"], columns)


def test_tradeoff_praises_no_untrained_student(table):
    figure = kd.plot_tradeoff(table)
    assert legend(figure.axes[0]) == ["teacher, 16.0 MB", "soft, 8.0 MB"]
    assert title(figure) == "soft: 1.25 times the perplexity, 0.50 of the size, 0.50 of the time"
    alone = kd.plot_tradeoff(table[:2].rename(index={"untrained": "new"}), untrained=["new"])
    assert len(alone.axes[0].collections[1].get_facecolor()) == 0
    assert title(alone).startswith("new: 12.50 times the perplexity")


def test_latency_is_one_panel_over_tokens():
    rows = [
        (name, batch, length, time * batch * length)
        for name, time in (("teacher", 0.002), ("student", 0.001))
        for batch, length in ((1, 16), (2, 16), (1, 32))
    ]
    figure = kd.plot_latency(pd.DataFrame(rows, columns=["model", "batch", "length", "seconds"]))
    assert len(figure.axes) == 1 and legend(figure.axes[0]) == ["teacher", "student"]
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx([32, 64])
    assert title(figure) == "student: 2.0 times as fast as teacher"


def test_sweep_explains_its_bars_and_its_band():
    columns = ["temperature", "alpha", "seed", "perplexity"]
    measured = [(T, 0.0, s, 30 + T + s) for T in (1, 2) for s in (0, 1)]
    measured += [(1, 1.0, s, 40 + s) for s in (0, 1)]
    figure = kd.plot_sweep(pd.DataFrame(measured, columns=columns))
    found = figure.legends[0]
    assert {text.get_text() for text in found.get_texts()} == {
        "soft labels only (alpha = 0)",
        "hard labels only (alpha = 1)",
    }
    assert found.get_title().get_text() == "bars and band: 95% intervals over 2 seeds"
    assert title(figure) == "Lowest perplexity: soft labels only, T = 1: 31.50"


def test_token_view_shows_what_each_would_say(logits, tokenizer):
    p, q = logits
    figure = kd.plot_token_view(p, q, tokenizer, "the end")
    names = rows(figure)
    assert len(names) == 9 and names[-1] == "all others"  # 300 to 303, 305, 306, 0 and 1
    for bars, z in zip(figure.axes[0].containers, (p, q), strict=True):
        widths = [bar.get_width() for bar in bars]
        assert sum(widths) == pytest.approx(1, abs=1e-5)
        assert max(widths[:-1]) == pytest.approx(kd.soften(z).max().item())
    first, second = names[0], names[3]
    assert title(figure).startswith(f"the end …\nTeacher: “{first}”, student: “{second}”")


def test_divergence_has_a_scale_and_shades():
    figure = kd.plot_divergence(["The", " Mo", "le"], [1.0, -1e-9, 4.0])
    assert title(figure) == "1.67 nats a token; most, 4.00, at “le”"
    assert figure.axes[1].get_xlabel() == "nats per token"
    shades = [bar.get_facecolor() for bar in figure.axes[0].patches]
    assert shades[1] == to_rgba("white") and shades[2] == pytest.approx(to_rgba("#d1495b"))
    assert "".join(texts(figure)) == "TheMole"


def test_exposure_averages_windows_and_names_the_nearest_text():
    far = np.repeat([0.2, 0.4], 8).tolist() + [9.0]  # the last token fills no window
    figure = kd.plot_exposure({"the book": [0.1] * 17, "its own": far})
    lines = figure.axes[0].get_lines()
    assert lines[1].get_xydata().tolist() == pytest.approx(np.array([[4, 0.2], [12, 0.4]]))
    assert legend(figure.axes[0]) == ["the book, mean 0.100", f"its own, mean {np.mean(far):.3f}"]
    assert title(figure) == "Nearest on the book (0.100), furthest on its own"


def test_writing_is_a_line_a_writer_over_sampling_temperature():
    rows = [("teacher", 0.5, 2.0, 0.6), ("teacher", 1.0, 3.0, 0.9), ("student", 1.0, 4.0, 0.8)]
    rows += [("student", 1.0, 5.0, 0.8), ("student", 0.5, 2.5, 0.5)]
    columns = ["way", "sampling", "teacher_nats", "distinct"]
    figure = kd.plot_writing(pd.DataFrame(rows, columns=columns))
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].get_lines()}
    assert lines == {"teacher": [[0.6, 2.0], [0.9, 3.0]], "student": [[0.5, 2.5], [0.8, 4.5]]}
    assert texts(figure) == ["T = 0.5", "T = 1"]
    assert "the teacher is the dashed line" in title(figure)


def test_bits_stand_beside_their_markers_on_a_line_a_model():
    rows = [("teacher", 8, 4.7, 0.01), ("teacher", 4, 2.4, 0.2), ("student", 8, 2.8, 0.1)]
    columns = ["model", "bits", "megabytes", "kl_to_teacher"]
    fig = kd.plot_bits(pd.DataFrame(rows, columns=columns))
    (ax,) = fig.axes
    beside = {tuple(text.xy): text.get_text() for text in ax.texts}
    assert beside == {(4.7, 0.01): "8", (2.4, 0.2): "4", (2.8, 0.1): "8"}
    assert [line.get_label() for line in ax.lines] == ["teacher", "student"]
    assert ax.get_title(loc="left") == "Lowest: teacher 0.01 at 4.7 MB; student 0.1 at 2.8 MB"


def test_words_are_not_broken_across_lines():
    places = wrap_words(["The", " Mo", "le", " r", "ow", "ed"], 12)
    assert [row for row, _, _ in places] == [0, 0, 0, 1, 1, 1]
    assert [column for _, column, _ in places] == [0, 3, 6, 0, 2, 4]


def test_attention_is_a_map_a_model_with_the_share_of_the_first_token(tokenizer):
    looks_back = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.1, 0.2, 0.7]])
    ids = torch.tensor([300, 301, 302])
    figure = kd.plot_attention({"teacher": looks_back, "student": torch.eye(3)}, ids, tokenizer)
    assert title(figure) == "teacher: 30% to the first token"
    assert title(figure, 1) == "student: 0% to the first token"
    drawn = [axes.images[0].get_array() for axes in figure.axes[:2]]
    assert np.array_equal(drawn[0], looks_back) and np.array_equal(drawn[1], np.eye(3))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == rows(figure)
    assert len(kd.plot_attention({"alone": looks_back}, ids, tokenizer).axes) == 2  # and a scale


def test_acceptance_lies_near_the_diagonal_and_says_how_near():
    figure = kd.plot_acceptance({"before": (0.5, 0.52), "distilled": (0.8, 0.79)})
    diagonal, *points = figure.axes[0].get_lines()
    assert diagonal.get_xydata() == pytest.approx(np.array([[0.45, 0.45], [0.85, 0.85]]))
    assert [point.get_xydata().tolist() for point in points] == [[[0.5, 0.52]], [[0.8, 0.79]]]
    assert legend(figure.axes[0])[1:] == ["before: 0.500, 0.520", "distilled: 0.800, 0.790"]
    assert title(figure) == (
        "distilled: 79% accepted; from its logits each share is known to within 0.020"
    )


def test_speedup_draws_the_formula_and_what_was_measured():
    figure = kd.plot_speedup(0.5, 0.5, [1, 2], measured=[0.9, 0.7], checks=[1.0, 2.0])
    one, *lines = [line.get_ydata() for line in figure.axes[0].get_lines()]
    assert list(one) == [1, 1]
    assert np.array(lines) == pytest.approx(
        np.array([[1.5 / 1.5, 1.75 / 2], [1.5 / 1.5, 1.75 / 3], [0.9, 0.7]])
    )
    assert title(figure).startswith(
        "50% accepted: at best 0.90 times the teacher's speed, at k = 1"
    )
    alone = kd.plot_speedup(0.5, 0.0, [1, 2])
    assert "at best 1.75" in title(alone) and len(alone.axes[0].get_lines()) == 2


# -- widgets ---------------------------------------------------------------------------


def test_the_temperature_slider_and_the_prompt_redraw(teacher, tokenizer, monkeypatch):
    shown = []
    monkeypatch.setattr(explorers, "display", shown.append)
    prompt, slider, _ = kd.explore_temperature(teacher, tokenizer, ["The Mole", "A"]).children
    slider.value = 4.0
    prompt.value = "A"
    assert [title(figure)[:6] for figure in shown] == ["T = 1:", "T = 4:", "T = 4:"]
    assert shown[1].description != shown[2].description


def test_the_token_slider_moves_through_the_text(teacher, make_gpt2, tokenizer, monkeypatch):
    shown = []
    monkeypatch.setattr(explorers, "display", shown.append)
    box = kd.explore_tokens(teacher, make_gpt2(2, seed=1), tokenizer, "The Mole was here")
    box.children[0].value = 3
    assert len(shown) == 2 and title(shown[0]) != title(shown[1])


def test_attention_sliders_show_the_layer_that_was_copied(make_gpt2, tokenizer, monkeypatch):
    shown, teacher = [], make_gpt2(4)
    monkeypatch.setattr(explorers, "plot_attention", lambda maps, ids, _: maps)
    monkeypatch.setattr(explorers, "display", shown.append)
    student = kd.student_from_teacher(teacher, 2)
    usual = teacher.config._attn_implementation
    layer, head, _ = kd.explore_attention(teacher, student, tokenizer, "The Mole").children
    layer.value, head.value = 2, 2
    assert [list(maps) for maps in shown[:2]] == [
        ["teacher, layer 1", "student, layer 1"],
        ["teacher, layer 4", "student, layer 2"],
    ]
    first, second = shown[0].values()  # both read the embeddings, with the same weights
    assert torch.allclose(first, second) and torch.allclose(first.sum(-1), torch.ones(()))
    assert not torch.equal(*(maps["teacher, layer 4"] for maps in shown[1:]))
    assert teacher.config._attn_implementation == usual


def test_the_speed_up_sliders_begin_at_what_was_measured(monkeypatch):
    shown = []
    monkeypatch.setattr(explorers, "display", shown.append)
    acceptance, cost, _ = kd.explore_speedup(0.8, 0.6, [1, 2, 4]).children
    cost.value = 0.0
    acceptance.value = 1.0
    assert [title(figure)[:13] for figure in shown] == ["80% accepted:"] * 2 + ["100% accepted"]
    assert "at best 5.00" in title(shown[-1])


def test_a_model_without_attention_has_no_maps(tokenizer, teacher):
    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1)
    )
    with pytest.raises(kd.InputError, match="mamba family have no attention maps"):
        kd.explore_attention(teacher, mamba, tokenizer, "The Mole")


def test_the_prompt_box_writes_again_and_escapes(teacher, tokenizer):
    box = kd.prompt_box({"<b>teacher": teacher}, tokenizer, "The Mole", max_new_tokens=4)
    prompt, seed, out = box.children
    before = out.value
    seed.value = 7
    assert out.value != before and "&lt;b&gt;teacher" in out.value
    prompt.value = "A <i>Rat"
    assert "A &lt;i&gt;Rat" in out.value


def test_memory_has_a_bar_for_each_plan_and_names_the_largest_part(make_gpt2, blocks):
    teacher = make_gpt2()
    plans = {
        name: kd.plan(teacher, 2, blocks, kd.DistillConfig(batch_size=size), rate=1e9)
        for name, size in (("one block", 1), ("many", 16))
    }
    figure = kd.plot_memory(plans)
    assert rows(figure) == ["one block", "many"]
    assert texts(figure) == [f"{plan.peak_memory / 1e6:,.0f} MB" for plan in plans.values()]
    first = plans["one block"].memory
    assert title(figure).startswith(f"Most memory goes to {max(first, key=first.get)}")
    assert [t.get_text() for t in figure.legends[0].get_texts()] == list(first)
