"""The study file: what it accepts, and what it says about every kind of mistake."""

import textwrap

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from locft.errors import InputError
from sweeps.study.plan import check_against_model, selected_layers
from sweeps.study.reader import load_study, ready_studies, study_to_yaml
from sweeps.study.schema import EveryLayer, LogUniform, Study

MODULES = {layer: ("mlp_down", "mlp_up", "mlp", "attn", "layer") for layer in range(30)}


def write(folder, text, name="study.yaml"):
    path = folder / name
    path.write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")
    return path


def problems(path, *overrides):
    """What `load_study` says, with the path taken off the beginning."""
    with pytest.raises(InputError) as caught:
        load_study(str(path), overrides)
    return [problem.removeprefix(f"{path}:") for problem in caught.value.problems]


def test_a_name_alone_is_a_study_with_the_documented_defaults(tmp_path):
    study = load_study(str(write(tmp_path, "name: mine")))
    assert (study.model, study.dtype, study.device, study.epochs) == ("smollm2-135m", "float32", "auto", 25)
    assert (study.edits.source, study.edits.limit, study.capability.suite) == ("atlas", None, "probes")
    assert (study.space.layer, study.space.module, study.space.batch_size) == ("all", ("mlp_down",), (32,))
    assert (study.skip_below, study.stop_below, study.search.method, study.resources.concurrent) == (
        0.01,
        0.01,
        "grid",
        "auto",
    )


def test_axes_take_lists_scalars_and_rules(tmp_path):
    path = write(
        tmp_path,
        """
        name: mine
        space:
          layer: {every: 10}
          module: mlp
          batch_size: [1, 8]
          learning_rate: {log_uniform: [1e-4, 1E-2]}
        search: {method: random, trials: 3}
        """,
    )
    space = load_study(str(path)).space
    assert [load_study(str(path), [f"capability.lm_eval={tasks}"]).capability.lm_eval for tasks in ("mmlu", "[]")] == [
        ("mmlu",),
        (),
    ]
    assert space.layer == EveryLayer(every=10)
    assert (space.module, space.batch_size) == (("mlp",), (1, 8))
    assert space.learning_rate == LogUniform(log_uniform=(0.0001, 0.01))


@pytest.mark.parametrize(
    ("written", "layers"),
    [("all", range(30)), ("7", [7]), ("[7, 3]", [3, 7]), ("{every: 8}", [0, 8, 16, 24])],
)
def test_layers_selected(tmp_path, written, layers):
    study = load_study(str(write(tmp_path, "name: mine")), [f"space.layer={written}"])
    assert selected_layers(study, 30) == tuple(layers)


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "0.0001", ".0001", "'1e-4'", "+1.0e-4"])
def test_scientific_notation_is_a_number(tmp_path, written):
    assert load_study(str(write(tmp_path, f"name: mine\nspace: {{learning_rate: {written}}}"))).space.learning_rate == (
        1e-4,
    )


def test_plain_words_are_not_turned_into_dates_booleans_or_octal(tmp_path):
    study = load_study(str(write(tmp_path, "name: 2024-01-01\nmodel: no\nepochs: 010")))
    assert (study.name, study.model, study.epochs) == ("2024-01-01", "no", 10)


MISTAKES = {
    "unknown key": ("name: a\nepoch: 3", "2: epoch: unknown key; did you mean epochs? (valid: name, model"),
    "unknown key in a section": (
        "name: a\nspace:\n  layr: 3",
        "3: space.layr: unknown key; did you mean layer? (valid: layer,",
    ),
    "key of another section": ("name: a\nbatch_size: 3", "2: batch_size: unknown key; did you mean space.batch_size?"),
    "key of the wrong section": ("name: a\nspace: {epochs: 3}", "2: space.epochs: unknown key; did you mean epochs?"),
    "misspelt rule": ("name: a\nspace: {layer: {evry: 3}}", "2: space.layer.evry: unknown key; did you mean every?"),
    "no name": ("model: gpt2", "1: name: required, but missing"),
    "misspelt name": ("nane: a", "1: nane: unknown key; did you mean name?"),
    "empty name": ("name: ''", '1: name: got "", expected 1 to 100 letters'),
    "name with slash": ("name: a/b", '1: name: got "a/b", expected 1 to 100 letters'),
    "name with a line break": ('name: "a\\n"', '1: name: got "a\\n", expected 1 to 100 letters'),
    "number as name": ("name: 12", "1: name: got 12, expected 1 to 100 letters"),
    "text for a number": ("name: a\nepochs: many", '2: epochs: got "many", expected a whole number'),
    "truth for a number": ("name: a\nepochs: true", "2: epochs: got true, expected a whole number"),
    "no epochs": ("name: a\nepochs: 0", "2: epochs: got 0, expected a whole number of at least 1"),
    "nothing": ("name: a\nepochs:", "2: epochs: got nothing, expected a whole number"),
    "negative rate": (
        "name: a\nspace:\n  learning_rate:\n    - 0.001\n    - -1e-4",
        "5: space.learning_rate[1]: got -0.0001, expected a number above 0",
    ),
    "text for a rate": (
        "name: a\nspace: {learning_rate: fast}",
        '2: space.learning_rate[0]: got "fast", expected a number above 0',
    ),
    "infinite rate": (
        "name: a\nspace: {learning_rate: .inf}",
        "2: space.learning_rate[0]: got Infinity, expected a finite number",
    ),
    "zero batch": (
        "name: a\nspace: {batch_size: [1, 0]}",
        "2: space.batch_size[1]: got 0, expected a whole number of at least 1",
    ),
    "half a batch": ("name: a\nspace: {batch_size: 1.5}", "2: space.batch_size[0]: got 1.5, expected a whole number"),
    "negative layer": (
        "name: a\nspace: {layer: -1}",
        "2: space.layer[0]: got -1, expected a whole number of at least 0",
    ),
    "layer word": ("name: a\nspace: {layer: al}", '2: space.layer: got "al", expected all, a layer, a list of layers'),
    "layer range": (
        "name: a\nspace: {layer: 3-7}",
        '2: space.layer: got "3-7", expected all, a layer, a list of layers',
    ),
    "empty axis": ("name: a\nspace: {module: []}", "2: space.module: got [], expected at least one value"),
    "double value": (
        "name: a\nspace:\n  seed: [1,\n    2,\n    1]",
        "5: space.seed[2]: got 1 twice, expected every value once",
    ),
    "rule on a counted axis": ("name: a\nspace: {batch_size: {log_uniform: [1, 9]}}", "2: space.batch_size: got {"),
    "pipeline": (
        "name: a\nspace: {pipeline: breadth-first}",
        '2: space.pipeline[0]: got "breadth-first", expected breadth_first, depth_first or stream; did you mean breadth_first?',
    ),
    "search method": (
        "name: a\nsearch: {method: gird}",
        '2: search.method: got "gird", expected grid, random or optuna; did you mean grid?',
    ),
    "section that is a list": ("name: a\nspace: [1]", "2: space: got [1], expected a mapping of keys to values"),
    "bounds in the wrong order": (
        "name: a\nspace: {learning_rate: {log_uniform: [0.1, 0.01]}}\nsearch: {method: random, trials: 2}",
        "2: space.learning_rate.log_uniform: got [0.1, 0.01], expected the lower bound first",
    ),
    "three bounds": (
        "name: a\nspace: {learning_rate: {log_uniform: [1, 2, 3]}}\nsearch: {method: random, trials: 2}",
        "2: space.learning_rate.log_uniform: got [1, 2, 3], expected two numbers, [low, high]",
    ),
    "dtype": (
        "name: a\ndtype: fp32",
        '2: dtype: got "fp32", expected float32, bfloat16 or float16; did you mean float32?',
    ),
    "device": ("name: a\ndevice: gpu", '2: device: got "gpu", expected auto, cpu, cuda, cuda:N or mps'),
    "suite": (
        "name: a\ncapability: {suite: probe}",
        '2: capability.suite: got "probe", expected probes; did you mean probes?',
    ),
    "task name": (
        "name: a\ncapability: {tasks: {a b: x}}",
        '2: capability.tasks.a b: got "a b", expected 1 to 100 letters',
    ),
    "harness tasks by name": (
        "name: a\ncapability: {lm_eval: {arc_easy: 5}}",
        '2: capability.lm_eval: got {"arc_easy": 5}, expected a task or a list of tasks',
    ),
    "task path": ("name: a\ncapability: {tasks: {a: 3}}", "2: capability.tasks.a: got 3, expected text"),
    "no items": (
        "name: a\ncapability: {limit: 0}",
        "2: capability.limit: got 0, expected a whole number of at least 1",
    ),
    "concurrent zero": (
        "name: a\nresources: {concurrent: 0}",
        "2: resources.concurrent: got 0, expected auto or a whole number",
    ),
    "broken gpus": (
        "name: a\nresources: {gpus: 1.5}",
        "2: resources.gpus: got 1.5, expected a fraction of one GPU or a whole",
    ),
    "negative stop": ("name: a\nstop_below: -1", "2: stop_below: got -1, expected a number of at least 0"),
    "huge seed": (
        "name: a\nspace: {seed: 4294967296}",
        "2: space.seed[0]: got 4294967296, expected a whole number of at least 0 and below 4,294,967,296",
    ),
    "too many trials": (
        "name: a\nsearch: {method: random, trials: 100001}",
        "2: search.trials: got 100001, expected a whole number of at least 1 and below 100,001",
    ),
    "very long number": ("name: a\nepochs: " + "9" * 5000, "2: epochs: got Infinity, expected a whole number"),
    "continuous grid": (
        "name: a\nspace: {learning_rate: {log_uniform: [1e-4, 1e-2]}}",
        "2: space.learning_rate: log_uniform cannot be searched as a grid",
    ),
    "trials of a grid": (
        "name: a\nsearch:\n  method: grid\n  trials: 4",
        "4: search.trials: got 4 with search.method grid",
    ),
    "no trials": ("name: a\nsearch: {method: random}", "2: search.method: random needs search.trials"),
    "gpus on a cpu": ("name: a\ndevice: cpu\nresources:\n  gpus: 1", "4: resources.gpus: got 1 with device cpu"),
    "cuda without gpus": ("name: a\ndevice: cuda", "2: device: cuda needs resources.gpus above 0"),
    "another GPU": (
        "name: a\nresources: {gpus: 1}\ndevice: cuda:1",
        "3: device: got cuda:1, but a trial sees its GPU as cuda:0",
    ),
    "a third GPU of two": (
        "name: a\nresources: {gpus: 2}\ndevice: cuda:2",
        "3: device: got cuda:2, but a trial sees its 2 GPUs as cuda:0 to cuda:1",
    ),
    "missing file": ("name: a\nedits:\n  source: ./edits.jsonl", "3: edits.source: no such file: "),
    "a home that is nobody's": ("name: a\nmodel: ~nobody-here/m", "2: model: no such file: "),
    "missing prose": ("name: a\ncapability: {prose: wiki}", "2: capability.prose: no such file: "),
    "double key": ("name: a\nepochs: 2\nepochs: 3", "3: epochs: given twice, first on line 2"),
    "double key below": ("name: a\nedits:\n  limit: 3\n  limit: 4", "4: edits.limit: given twice, first on line 3"),
    "broken": ("name: a\nspace: {layer: [1, 2}\nepochs: 3", "2: not plain YAML: "),
    "a tab": ("name: a\nspace:\n\tlayer: 3", "3: not plain YAML: "),
    "a control character": ("name: a\nmodel: \x01", "2: not plain YAML: character #x0001"),
    "two documents": ("name: a\n---\nname: b", "2: not plain YAML: "),
    "an alias": ("name: &n a\nmodel: *n", "2: not plain YAML: the alias *n is not allowed"),
    "a tag": (
        "name: a\nmodel: !!python/object/apply:os.system ['true']",
        "2: not plain YAML: the tag !!python/object/apply:os.system is not allowed",
    ),
    "a tag of one's own": ("name: a\nmodel: !env MODEL", "2: not plain YAML: the tag !env is not allowed"),
    "a list as key": ("name: a\n? [b]\n: c", "2: a key must be text"),
    "a list at the top": ("- name", '1: got ["name"], expected a mapping with keys such as name'),
    "an empty file": ("# nothing yet\n", "1: got nothing, expected a mapping with keys such as name"),
    "deep nesting": ("name: " + "[" * 5000, "1: not plain YAML: nested too deeply"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_named_with_its_line(tmp_path, kind):
    text, expected = MISTAKES[kind]
    found = problems(write(tmp_path, text))
    assert len(found) == 1, found
    assert found[0].startswith(expected), found


def test_all_problems_come_at_once_in_the_order_of_the_lines(tmp_path):
    path = write(
        tmp_path,
        """
        name: a b
        epochs: 0
        space:
          layer: [1, 1]
          modul: mlp
          learning_rate: [-1, x]
        search: {method: grid, trials: 3}
        """,
    )
    found = problems(path, "space.seed=x", "nothing", "resources.gpus=1", "device=cpu")
    starts = [problem.split(": got")[0].split(": unknown")[0] for problem in found]
    assert starts[:6] == [
        "1: name",
        "2: epochs",
        "4: space.layer[1]",
        "5: space.modul",
        "6: space.learning_rate[0]",
        "6: space.learning_rate[1]",
    ]
    assert starts[6:] == [
        "7: search.trials",
        "--set nothing: expected field=value, such as space.layer=[3,7]",
        "--set space.seed: space.seed[0]",
        "--set resources.gpus",
    ]


def test_a_contradiction_with_an_invalid_field_is_not_told(tmp_path):
    found = problems(write(tmp_path, "name: a\nsearch: {method: randm, trials: 3}"))
    assert len(found) == 1 and found[0].startswith('2: search.method: got "randm"')


def test_study_checks_itself_when_made_without_a_file():
    with pytest.raises(ValueError, match=r"random needs search\.trials"):
        Study.model_validate({"name": "a", "search": {"method": "random"}})


def test_a_missing_study_names_the_nearest(tmp_path):
    write(tmp_path, "name: a", "my-study.yaml")
    (found,) = problems(tmp_path / "my-stdy.yaml")
    assert f"no such file and no ready study; did you mean {tmp_path / 'my-study.yaml'}?" in found
    assert f"ready studies: {', '.join(ready_studies())}" in found and "layer-sweep" in ready_studies()
    assert "no such file and no ready study" in problems("~nobody-here/study.yaml")[0]
    with pytest.raises(InputError, match="did you mean quickstart"):
        load_study("quikstart")


def test_unreadable_files(tmp_path):
    assert "this is a folder" in problems(tmp_path)[0]
    (tmp_path / "latin.yaml").write_bytes("name: a\nmodel: caf\xe9".encode("latin-1"))
    assert problems(tmp_path / "latin.yaml")[0].startswith("2: byte 0xe9 at offset 18 is not UTF-8")
    (tmp_path / "big.yaml").write_bytes(b"#" * 1_000_001)
    assert "larger than 1,000,000 bytes" in problems(tmp_path / "big.yaml")[0]
    assert "cannot read the study file" in problems("a" * 5000)[0]
    assert "cannot read the study file" in problems("a\0b")[0]
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfname: a")
    assert load_study(str(tmp_path / "bom.yaml")).name == "a"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("space.layr=3", "--set space.layr: unknown key; did you mean layer?"),
        ("layer=3", "--set layer: unknown key; did you mean space.layer?"),
        ("space.layer=[3", "--set space.layer: not plain YAML: "),
        ("space.batch_size=0", "--set space.batch_size: space.batch_size[0]: got 0"),
        ("space.layer.every=0", "--set space.layer.every: got 0, expected a whole number of at least 1"),
        ("space..layer=3", "--set space..layer=3: expected field=value"),
        ("epochs", "--set epochs: expected field=value"),
        ("edits={limit: 1, limit: 2}", "--set edits: limit: given twice"),
        ("search.trials=3", "--set search.trials: got 3 with search.method grid"),
    ],
)
def test_overrides_are_checked_like_the_file(tmp_path, override, expected):
    found = problems(write(tmp_path, "name: a"), override)
    assert len(found) == 1 and found[0].startswith(expected), found


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path):
    path = write(tmp_path, "name: a\nepochs: many\nspace: {layer: all}")
    study = load_study(
        str(path), ["epochs=3", "epochs=4", "space.layer.every=5", "space.module=[mlp, attn]", "edits.limit=7"]
    )
    assert (study.epochs, study.space.layer, study.space.module) == (4, EveryLayer(every=5), ("mlp", "attn"))
    assert study.edits.limit == 7 and study.edits.source == "atlas"


def test_paths_are_relative_to_the_file_and_those_of_overrides_to_the_working_folder(tmp_path, monkeypatch):
    home, here = tmp_path / "studies", tmp_path / "here"
    for folder in (home, here):
        (folder / "model").mkdir(parents=True)
        for name in ("edits.jsonl", "arc.jsonl", "wiki"):
            (folder / name).write_text("")
    monkeypatch.chdir(here)
    text = """
        name: a
        model: model
        edits: {source: edits.jsonl}
        capability: {prose: wiki, tasks: {arc: ./arc.jsonl, hub: allenai/ai2_arc, prose: owner/prose}}
        """
    path = write(home, text)
    study = load_study(str(path))
    assert (study.model, study.edits.source) == (str(home / "model"), str(home / "edits.jsonl"))
    hub = {"hub": "allenai/ai2_arc", "prose": "owner/prose"}
    assert study.capability.tasks == {"arc": str(home / "arc.jsonl"), **hub}
    assert study.capability.prose == str(home / "wiki")
    study = load_study(str(path), ["edits.source=edits.jsonl", "capability.tasks.arc=arc.jsonl"])
    assert study.edits.source == str(here / "edits.jsonl") and study.model == str(home / "model")
    assert study.capability.tasks == {"arc": str(here / "arc.jsonl"), **hub}
    assert load_study("quickstart", ["model=model"]).model == str(here / "model")
    assert load_study("quickstart").model == "smollm2-135m"


def test_a_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "edits.jsonl").write_text("")
    (found,) = problems(write(tmp_path, "name: a\nedits: {source: edit.jsonl}"))
    assert found.endswith("edit.jsonl; did you mean edits.jsonl?")


def test_what_only_the_model_can_tell(tmp_path):
    study = load_study(str(write(tmp_path, "name: a\nspace: {layer: [3, 99, 40], module: [mlp_dwn, mlp]}")))
    with pytest.raises(InputError) as caught:
        check_against_model(study, 30, MODULES)
    layer_40, layer_99, module = caught.value.problems
    assert layer_40 == "space.layer: layer 40: smollm2-135m has layers 0 to 29"
    assert layer_99 == "space.layer: layer 99: smollm2-135m has layers 0 to 29"
    assert module == (
        "space.module: smollm2-135m has no module 'mlp_dwn'; did you mean mlp_down? "
        "(valid: mlp_down, mlp_up, mlp, attn, layer)"
    )
    check_against_model(load_study("layer-sweep"), 30, MODULES)


def test_modules_of_a_hybrid_model(tmp_path):
    hybrid = {layer: ("attn", "mlp") if layer % 4 == 3 else ("mixer", "mlp") for layer in range(8)}
    path = str(write(tmp_path, "name: a\nspace: {layer: [0, 1], module: [attn, mlp]}"))
    with pytest.raises(InputError, match="layers 0, 1 of smollm2-135m have no 'attn'; it is in layers 3, 7"):
        check_against_model(load_study(path), 8, hybrid)
    check_against_model(load_study(path, ["space.layer=[0, 3]"]), 8, hybrid)
    with pytest.raises(InputError, match=r"space\.layer\.every: got 8"):
        check_against_model(load_study(path, ["space.layer.every=8", "space.module=mlp"]), 8, hybrid)


@pytest.mark.parametrize("name", ready_studies())
def test_ready_studies_load_and_are_named_like_their_file(name, tmp_path):
    study = load_study(name)
    assert study.name == name
    check_against_model(study, 30, MODULES)
    assert load_study(str(write(tmp_path, study_to_yaml(study)))) == study


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(
    lambda text: (
        not text.lower().endswith((".json", ".txt", ".md", ".csv"))
        and "/" not in text
        and not text.startswith(("~", "."))
    )
)
RATES = st.floats(1e-12, 1e3, exclude_min=True)


def axis(values):
    return st.lists(values, min_size=1, max_size=4, unique=True)


STUDIES = st.fixed_dictionaries(
    {"name": NAMES},
    optional={
        "model": TEXTS,
        "dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
        "edits": st.fixed_dictionaries({}, optional={"source": TEXTS, "limit": st.none() | st.integers(1, 10**6)}),
        "capability": st.fixed_dictionaries({}, optional={"tasks": st.dictionaries(NAMES, TEXTS, max_size=2)}),
        "space": st.fixed_dictionaries(
            {},
            optional={
                "layer": axis(st.integers(0, 99)) | st.just("all") | st.builds(dict, every=st.integers(1, 9)),
                "module": axis(st.sampled_from(["mlp", "attn", "layer"])),
                "batch_size": axis(st.integers(1, 512)) | st.integers(1, 512),
                "learning_rate": axis(RATES),
                "seed": axis(st.integers(0, 2**32 - 1)),
            },
        ),
        "stop_below": st.floats(0, 10),
        "search": st.builds(dict, method=st.sampled_from(["random", "optuna"]), trials=st.integers(1, 1000)),
        "resources": st.builds(dict, concurrent=st.integers(1, 64) | st.just("auto")),
    },
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(tree=STUDIES)
def test_a_study_is_the_same_after_writing_and_reading(tmp_path, tree):
    study = Study.model_validate(tree)
    text = study_to_yaml(study)
    path = tmp_path / "study.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_study(str(path)) == study
    assert Study.model_validate(yaml.safe_load(text)) == study
    assert study_to_yaml(load_study(str(path))) == text


def test_a_map_of_edits_is_read_checked_and_written_out(tmp_path):
    path = tmp_path / "study.yaml"
    fields = "map: {prompt: q, rephrases: [a, b], locality: {prompt: n}}"
    path.write_text(f"name: s\nedits: {{source: atlas, {fields}}}\n")
    study = load_study(str(path), ["edits.map.target=answer"])
    assert study.edits.map == {
        "prompt": ("q",),
        "rephrases": ("a", "b"),
        "locality.prompt": ("n",),
        "target": ("answer",),
    }
    path.write_text(study_to_yaml(study))
    assert load_study(str(path)) == study
    path.write_text("name: s\nedits: {source: atlas, map: {promt: q}}\n")
    with pytest.raises(InputError, match=r"study.yaml:2: edits.map: got the field promt, .*did you mean prompt"):
        load_study(str(path))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(layers=axis(st.integers(0, 99)), rates=axis(RATES), limit=st.none() | st.integers(1, 99))
def test_overrides_say_the_same_as_the_file(tmp_path, layers, rates, limit):
    limit_text = "null" if limit is None else limit
    overridden = load_study(
        "quickstart", [f"space.layer={layers}", f"space.learning_rate={rates}", f"edits.limit={limit_text}"]
    )
    tree = yaml.safe_load(study_to_yaml(load_study("quickstart")))
    tree["space"] |= {"layer": layers, "learning_rate": rates}
    tree["edits"]["limit"] = limit
    assert overridden == Study.model_validate(tree)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_content_is_read_or_refused_with_a_place(tmp_path, data):
    path = tmp_path / "study.yaml"
    path.write_bytes(data)
    try:
        load_study(str(path))
    except InputError as error:
        assert all(problem.startswith(f"{path}:") for problem in error.problems)


@settings(deadline=None)
@given(
    override=st.text(max_size=40)
    | st.builds("{}={}".format, st.sampled_from(["space", "edits.limit", "name", "a.b"]), st.text(max_size=20))
)
def test_any_override_is_taken_or_refused(override):
    try:
        load_study("quickstart", [override])
    except InputError as error:
        assert all(problem.startswith("--set ") for problem in error.problems)
