"""What is drawn is what was given: a test for each figure, table and control."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgba

import willows_kd as kd
from willows_kd.figures import explorers
from willows_kd.figures.plots import wrap_words

AXES = {"title": "A sentence.", "xlabel": "x", "ylabel": "y"}
BARS = {"title": "A sentence.", "xlabel": "x"}


def rows(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def texts(figure):
    return [text.get_text().strip() for text in figure.axes[0].texts]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def drawn(line):
    """The points of one line or error bar."""
    return np.column_stack(line.get_data()).tolist()


def test_bars_have_their_numbers_and_the_title_describes_the_figure():
    figure = kd.plot_bars({"a": {"up": 1.5, "down": -2}, "b": {"up": 3, "down": 4}}, **BARS)
    widths = [[bar.get_width() for bar in bars] for bars in figure.axes[0].containers]
    assert widths == [[1.5, -2], [3, 4]]
    assert rows(figure) == ["up", "down"] and legend(figure) == ["a", "b"]
    assert texts(figure) == ["1.5", "-2", "3", "4"]
    looks = [bars[0].get_hatch() for bars in figure.axes[0].containers]
    assert len(set(looks)) == 2  # told apart in grey
    assert figure.get_suptitle() == figure.description == "A sentence."
    assert figure._repr_mimebundle_()[1] == {"image/png": {"alt": "A sentence."}}


def test_stacked_bars_end_at_their_sum():
    figure = kd.plot_bars({"a": {"up": 1, "down": 2}, "b": {"up": 3, "down": 4}}, **BARS, stacked=1)
    assert [bar.get_x() for bar in figure.axes[0].containers[1]] == [1, 2]
    assert texts(figure) == ["4", "6"]


def test_dots_have_spans_and_levels():
    spans = pd.DataFrame({"mean": [2.0, 3.0], "min": [1, 3], "max": [4, 3]}, ["a", "b"])
    figure = kd.plot_dots(spans, **BARS, levels={"teacher": 1.0})
    wide, narrow = figure.axes[0].containers
    assert wide[2][0].get_segments()[0].tolist() == [[1, 0], [4, 0]] and not narrow.has_xerr
    assert rows(figure) == ["a", "b"]
    assert texts(figure) == ["2.000", "3.000", "teacher, 1.000"]
    alone = kd.plot_dots({"a": 10, "b": 1000}, **BARS, log=True, form=",.0f")
    assert alone.axes[0].get_xscale() == "log" and texts(alone) == ["10", "1,000"]


def test_lines_leave_out_what_is_missing_and_have_spans():
    lines = {"a": {2: 20.0, 1: 10.0}, "b": {1: 5.0, 4: math.nan, 8: 6.0}}
    figure = kd.plot_lines(lines, **AXES, levels={"teacher": 4}, log="x")
    first, second = (drawn(bar[0]) for bar in figure.axes[0].containers)
    assert first == [[1, 10], [2, 20]] and second == [[1, 5], [8, 6]]
    assert legend(figure) == ["teacher, 4", "a", "b"]
    assert figure.axes[0].get_xticks().tolist() == [1, 2, 4, 8]
    styles = {bar[0].get_linestyle() for bar in figure.axes[0].containers}
    assert len(styles) == 2  # told apart in grey
    spans = [pd.DataFrame({"a": [9.0, 8.0]}, [1, 2]), pd.DataFrame({"a": [12.0, 30.0]}, [1, 2])]
    with_spans = kd.plot_lines({"a": lines["a"]}, **AXES, spans=spans)
    (bar,) = with_spans.axes[0].containers
    ends = [segment.tolist() for segment in bar[2][0].get_segments()]
    assert ends == [[[1, 9], [1, 12]], [[2, 8], [2, 30]]]


def test_points_keep_their_notes_and_are_joined_if_asked():
    points = {"a": [(1, 10), (2, 5, "T = 2")], "b": [(3, 1)]}
    figure = kd.plot_scatter(points, **AXES, joined=True)
    assert [drawn(line) for line in figure.axes[0].lines] == [[[1, 10], [2, 5]], [[3, 1]]]
    assert texts(figure) == ["", "T = 2", ""] and legend(figure) == ["a", "b"]
    assert len({line.get_marker() for line in figure.axes[0].lines}) == 2
    apart = kd.plot_scatter(points, **AXES, log="y")
    assert {line.get_linestyle() for line in apart.axes[0].lines} == {"None"}
    assert apart.axes[0].get_yscale() == "log"


def test_heat_maps_are_side_by_side_on_one_scale():
    back = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    maps = {"teacher": back, "student": torch.eye(2)}
    figure = kd.plot_heatmaps(maps, title="A sentence.", labels=["The", "Mole"], shares="share")
    images = [ax.images[0] for ax in figure.axes[:2]]
    assert np.array_equal(images[0].get_array(), back)
    assert np.array_equal(images[1].get_array(), np.eye(2))
    assert {image.get_clim() for image in images} == {(0, 1)}
    assert [ax.get_title(loc="left") for ax in figure.axes[:2]] == ["teacher", "student"]
    assert rows(figure) == ["The", "Mole"]


def test_tokens_are_shaded_by_their_values():
    figure = kd.plot_tokens(["The", " $Mo", "le"], [1.0, -1e-9, 4.0], title="A sentence.")
    shades = [bar.get_facecolor() for bar in figure.axes[0].patches]
    assert shades[1] == to_rgba("white") and shades[2] == pytest.approx(to_rgba("#d1495b"))
    assert "".join(text.get_text() for text in figure.axes[0].texts) == "The $Mole"
    assert figure.axes[1].get_xlabel() == "nats per token"


def test_words_are_not_broken_across_lines():
    places = wrap_words(["The", " Mo", "le", " r", "ow", "ed"], 8)
    rows, columns, _ = map(list, zip(*places, strict=True))
    assert (rows, columns) == ([0, 0, 0, 1, 1, 1], [0, 3, 6, 0, 2, 4])


def test_the_rows_of_tokens_are_the_largest_of_each_and_what_is_left(tokenizer):
    p, q = torch.full((2, len(tokenizer)), 0.001)
    p[[300, 301]], q[[301, 302]] = torch.tensor([0.5, 0.25]), torch.tensor([0.25, -0.5])
    table = kd.token_table({"p": p, "q": q}, tokenizer, k=2, also=[5])
    assert len(table) == 5 and table.index[-1] == "all others"
    assert table["p"].tolist()[:2] == [0.5, 0.25]  # falling by the first
    assert sorted(table["q"].tolist()[:-1]) == pytest.approx([-0.5, 0.001, 0.001, 0.25])
    assert table.sum().tolist() == pytest.approx([p.sum().item(), q.sum().item()], abs=1e-5)


def test_curves_start_where_the_students_did_and_say_if_one_ended_early():
    rows = [{"step": i, "tokens": 500 * i} for i in (1, 2, 3)]
    whole = [rows[0], rows[1] | {"validation_perplexity": 40}]
    found = kd.curves({"soft": whole, "hard": [*whole, rows[2]]}, start=300.0)
    assert found["soft"].dropna().to_dict() == {0: 300, 2: 40}
    assert found["hard (ended early, step 3)"].dropna().to_dict() == {0: 300, 2: 40}
    assert kd.curves({"soft": whole}, along="tokens")["soft"].to_dict() == {1000: 40}


# -- controls --------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch):
    """The figures that controls display."""
    figures = []
    monkeypatch.setattr(explorers, "display", figures.append)
    return figures


def test_the_temperature_begins_at_the_dial(teacher, tokenizer, shown):
    box = kd.explore_temperature(teacher, tokenizer, ["The Mole", "A"], temperature=2.0)
    prompt, slider, _ = box.children
    slider.value = 1.0
    prompt.value = "A"
    titles = [figure.description.split(": entropy ")[0] for figure in shown]
    assert titles == ["After “The Mole”, T = 2", "After “The Mole”, T = 1", "After “A”, T = 1"]
    assert legend(shown[0]) == ["T = 2", "T = 1"] and not shown[1].legends


def test_the_token_slider_moves_through_the_text(teacher, make_gpt2, tokenizer, shown):
    box = kd.explore_tokens(teacher, make_gpt2(2, seed=1), tokenizer, "The Mole was here")
    (token, _), last = box.children, len(tokenizer("The Mole was here")["input_ids"]) - 1
    token.value = 99
    assert token.value == last  # held at its highest
    assert len(shown) == 2 and shown[0].description != shown[1].description
    assert legend(shown[0]) == ["teacher", "student"]


def test_the_prompt_box_writes_again_and_escapes(teacher, tokenizer):
    box = kd.prompt_box({"<b>teacher": teacher}, tokenizer, "The Mole", max_new_tokens=4)
    field, controls, out = box.children
    button, seed = controls.children
    before = out.value
    seed.value = 7
    assert out.value != before and "&lt;b&gt;teacher" in out.value
    field.value = "A <i>Rat"
    assert ">A &lt;i&gt;Rat</span>" in out.value
    assert (button.description, button.disabled) == ("Write", False)


def test_the_prompt_box_shows_that_it_writes(monkeypatch, teacher, tokenizer):
    box = kd.prompt_box({"a": teacher, "b": teacher}, tokenizer, "The Mole", max_new_tokens=1)
    _, controls, *outs = box.children
    button, seen = controls.children[0], []

    def write(model, tokenizer, prompt, *_, **__):
        seen.append((button.description, button.disabled, *("writing …" in o.value for o in outs)))
        return f"{prompt} was here"

    monkeypatch.setattr(explorers, "complete", write)
    button.click()
    assert seen == [("Writing …", True, True, True), ("Writing …", True, False, True)]
    assert (button.description, button.disabled) == ("Write", False)
    assert all(out.value.endswith("Mole</span> was here</p>") for out in outs)


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("The Mole", "The Mole was", '"opacity: 0.6">The Mole</span> was</p>'),
        ("The Mole", "Mole was", "the prompt's first 4 characters were cut off"),
        ("", "Once", "the box is empty"),
        ("A", "A <i>Rat", "A</span> &lt;i&gt;Rat</p>"),
    ],
)
def test_a_continuation_is_set_off_from_its_prompt_and_says_what_was_cut(prompt, text, expected):
    assert expected in explorers.continuation(prompt, text)
