"""Edit files: every layout reads to the same requests, findings are counted, and bad files are told whole."""

import json
import random
import subprocess
import sys
import types
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from locft.data import edit_layouts
from locft.data.edit_layouts import EditLayout, QuestionKeys
from locft.data.edit_request import EditRequest, LocalityPrompt, PortabilityPrompt
from locft.data.requests import EditFindings, load_edits, own_record
from locft.errors import InputError

REAL = Path(__file__).resolve().parents[3] / ".." / "shared" / "data" / "editing"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real edit files are not in ../shared/data/editing")
FUZZ = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

OWN = {"subject": "Peru", "prompt": "The capital of Peru is", "target": "Oslo"}
# fmt: off
ZSRE = {
    "subject": "Peru", "src": "What is the capital of Peru?", "pred": "Cusco", "alt": " Oslo", "cond": "Cusco >> Oslo",
    "answers": ["Lima", "Ciudad de los Reyes"], "rephrase": "Peru's capital?",
    "loc": "nq question: who painted the mona lisa", "loc_ans": "Leonardo",
}
FLAT = {
    "subject": "Peru", "prompt": "The capital of Peru is", "target_new": "Oslo",
    "rephrase_prompt": "So it goes.\nPeru's capital is",
    "locality_prompt": "The capital of Chile is", "locality_ground_truth": "Santiago",
}
COUNTERFACT = FLAT | {"case_id": 7, "ground_truth": "Lima"}
ORIGINAL = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The capital of {} is", "subject": "Peru", "relation_id": "P36",
        "target_new": {"str": "Oslo", "id": "Q585"}, "target_true": {"str": "Lima", "id": "Q2868"},
    },
    "paraphrase_prompts": ["Peru's capital is", "Peru is run from"],
    "neighborhood_prompts": ["The seat of Lima's mayor is"],
}
QAEDIT = {
    "id": "q-1", "source": "nq", "subject": "Peru", "prompt": "What is the capital of Peru?", "target": "Lima",
    "rephrase": "Peru's capital?",
    "locality": [{"loc": "Who painted it?", "loc_ans": "Leonardo"}, {"loc": "When?", "loc_ans": None}],
}
# fmt: on
LAYOUTS = {
    "own": OWN,
    "zsre": ZSRE,
    "counterfact": COUNTERFACT,
    "counterfact-original": ORIGINAL,
    "wikibigedit": FLAT,
    "qaedit": QAEDIT,
}  # fmt: skip


def without(record, key):
    return {name: value for name, value in record.items() if name != key}


def write(folder, content, name="edits.jsonl"):
    """Records as JSON lines, or as an indented JSON list when the name ends in .json; one record as JSON; text and bytes as
    they are. Returns the path."""
    path = folder / name
    if isinstance(content, list) and not name.endswith(".json"):
        content = "".join(json.dumps(record) + "\n" for record in content)
    elif isinstance(content, list | dict):
        content = json.dumps(content, indent=1 if isinstance(content, list) else None)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def problems_of(source, **options):
    with pytest.raises(InputError) as caught:
        load_edits(source, **options)
    return caught.value.problems


def only_problem(folder, records, name="edits.jsonl"):
    (problem,) = problems_of(write(folder, records, name))
    return problem


# --- layouts


def test_own_layout_in_full(tmp_path):
    record = OWN | {
        "id": "peru", "ground_truth": "Lima", "rephrases": [" Peru's capital is "], "relation": "capital", "my_note": 3,
        "locality": [{"prompt": "Chile's capital is", "answer": "Santiago"}, {"prompt": "Rome is in"}],
    }  # fmt: skip
    edits = load_edits(write(tmp_path, [record]))
    assert edits.layout == "own" and edits.source == str(tmp_path / "edits.jsonl")
    near = (LocalityPrompt("Chile's capital is", "Santiago"), LocalityPrompt("Rome is in", None))
    wanted = EditRequest("peru", "Peru", "The capital of Peru is", "Oslo", "Lima", ("Peru's capital is",), near)
    assert edits.requests == (wanted,)


def test_zsre(tmp_path):
    edits = load_edits(write(tmp_path, [ZSRE, ZSRE | {"src": "Another?"}], "edits.json"))
    assert edits.layout == "zsre"
    assert edits.requests[0] == EditRequest(
        "zsre-1", "Peru", "What is the capital of Peru?", "Oslo", "Lima", ("Peru's capital?",),
        (LocalityPrompt("nq question: who painted the mona lisa", "Leonardo"),),
    )  # fmt: skip
    assert edits.requests[1].id == "zsre-2"


def test_counterfact_flat_and_wikibigedit(tmp_path):
    (request,) = load_edits(write(tmp_path, [COUNTERFACT])).requests
    near = (LocalityPrompt("The capital of Chile is", "Santiago"),)
    rephrases = ("So it goes.\nPeru's capital is",)
    assert request == EditRequest("7", "Peru", "The capital of Peru is", "Oslo", "Lima", rephrases, near)
    edits = load_edits(write(tmp_path, [FLAT]))
    assert edits.layout == "wikibigedit"
    assert (edits.requests[0].id, edits.requests[0].ground_truth) == ("wikibigedit-1", None)


def test_counterfact_original(tmp_path):
    edits = load_edits(write(tmp_path, [ORIGINAL]))
    assert edits.layout == "counterfact-original"
    near = (LocalityPrompt("The seat of Lima's mayor is", "Lima"),)
    rephrases = ("Peru's capital is", "Peru is run from")
    assert edits.requests == (EditRequest("7", "Peru", "The capital of Peru is", "Oslo", "Lima", rephrases, near),)


def test_qaedit(tmp_path):
    for record, identity in ((QAEDIT, "q-1"), (without(without(QAEDIT, "source"), "id"), "qaedit-1")):
        edits = load_edits(write(tmp_path, [record]))
        assert edits.layout == "qaedit"
        (request,) = edits.requests
        assert (request.id, request.ground_truth, request.rephrases) == (identity, None, ("Peru's capital?",))
        assert request.locality == (LocalityPrompt("Who painted it?", "Leonardo"), LocalityPrompt("When?", None))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_in_every_form_of_file(tmp_path, layout):
    record = LAYOUTS[layout]
    line = json.dumps(record, ensure_ascii=False)
    forms = [
        write(tmp_path, [record], "a.json"),
        write(tmp_path, [record], "a.jsonl"),
        write(tmp_path, "\ufeff\r\n" + line + "\r\n\r\n", "b.jsonl"),
        write(tmp_path, line, "b.txt"),
    ]
    loaded = [load_edits(form) for form in forms]
    assert {edits.layout for edits in loaded} == {layout}
    assert len({(edits.requests, edits.fingerprint) for edits in loaded}) == 1


def test_targets_are_one_line_and_prompts_keep_theirs(tmp_path):
    names = ("prompt", "target", "ground_truth", "subject")
    written = (" One.\nTwo is ", " New \r\n\n York\n", "Old\nYork", "\tTwo")
    (request,) = load_edits(write(tmp_path, [dict(zip(names, written))])).requests
    assert [getattr(request, name) for name in names] == ["One.\nTwo is", "New York", "Old York", "Two"]


def test_absent_options_are_empty_in_foreign_layouts(tmp_path):
    record = FLAT | {"rephrase_prompt": None, "locality_prompt": "", "locality_ground_truth": ""}
    (request,) = load_edits(write(tmp_path, [record])).requests
    assert request.rephrases == () and request.locality == ()
    (request,) = load_edits(write(tmp_path, [FLAT | {"rephrase_prompt": ["a", "", "b"]}])).requests
    assert request.rephrases == ("a", "b")


def test_ids_are_unique(tmp_path):
    records = [COUNTERFACT, COUNTERFACT | {"prompt": "Other"}, without(COUNTERFACT, "case_id")]
    assert [request.id for request in load_edits(write(tmp_path, records)).requests] == ["7", "7#2", "counterfact-3"]
    records = [OWN, OWN | {"id": "own-1"}, OWN | {"id": 5}]
    assert [request.id for request in load_edits(write(tmp_path, records)).requests] == ["own-1#2", "own-1", "5"]


def test_the_built_in_edits_come_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edits = load_edits("atlas", limit=10)
    assert edits.source == "atlas" and edits.layout == "own" and len(edits.requests) == 10


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).map(str.strip)
texts = texts.filter(lambda text: text and "{}" not in text)  # which reading fills with the subject
lines = texts.map(lambda text: " ".join(part.strip() for part in text.splitlines() if part.strip()))
answers = st.lists(lines, min_size=1, max_size=2).map(tuple)
requests = st.builds(
    EditRequest,
    id=texts,
    subject=st.just("") | texts,
    prompt=texts,
    target=lines,
    ground_truth=st.none() | lines,
    rephrases=st.lists(texts, max_size=2).map(tuple),
    locality=st.lists(st.builds(LocalityPrompt, texts, st.none() | lines), max_size=2).map(tuple),
    portability=st.lists(st.builds(PortabilityPrompt, texts, answers), max_size=2).map(tuple),
)


@FUZZ
@given(wanted=st.lists(requests, min_size=1, max_size=4, unique_by=lambda request: request.id))
def test_own_format_reads_back(tmp_path, wanted):
    records = [own_record(request) for request in wanted]
    as_lines, as_list = (load_edits(write(tmp_path, records, name)) for name in ("a.jsonl", "a.json"))
    assert as_lines.requests == as_list.requests == tuple(wanted)
    assert as_lines.fingerprint == as_list.fingerprint


def test_a_new_layout_is_one_entry(tmp_path, monkeypatch):
    layout = EditLayout(
        name="cards", signs=("card",), subject=("card.about",), prompt="card.text", target="card.new",
        rephrases=("others",), locality=(QuestionKeys("kept[].say", ("kept[].hear",)),),
    )  # fmt: skip
    monkeypatch.setattr(edit_layouts, "LAYOUTS", (*edit_layouts.LAYOUTS, layout))
    card = {"card": {"about": "Peru", "text": "Its capital is", "new": "Oslo"}, "kept": [{"say": "a", "hear": "b"}]}
    edits = load_edits(write(tmp_path, [card]))
    wanted = EditRequest("cards-1", "Peru", "Its capital is", "Oslo", None, (), (LocalityPrompt("a", "b"),))
    assert edits.layout == "cards" and edits.requests == (wanted,)
    problem = only_problem(tmp_path, [{"card": {"about": "Peru", "txt": "Its capital is", "new": "Oslo"}}])
    assert "card.text: expected text, got no such field (the keys are about, txt, new; did you mean txt" in problem


# --- selection and fingerprint


def numbered(count):
    return [OWN | {"id": f"e{i}", "prompt": f"Prompt {i} is"} for i in range(count)]


def ids_of(source, **options):
    return [request.id for request in load_edits(source, **options).requests]


def test_limit_takes_the_first_and_a_seed_samples_in_file_order(tmp_path):
    source = write(tmp_path, numbered(40))
    everything = [f"e{i}" for i in range(40)]
    assert ids_of(source, limit=3) == everything[:3]
    assert ids_of(source) == ids_of(source, limit=40) == ids_of(source, limit=10**9, sample_seed=1) == everything
    assert ids_of(source, sample_seed=1) == everything
    # Written out: the sample must be the same on every machine and in every version.
    assert ids_of(source, limit=5, sample_seed=0) == ["e2", "e16", "e24", "e26", "e32"]
    assert ids_of(source, limit=5, sample_seed=0) == [f"e{i}" for i in sorted(random.Random(0).sample(range(40), 5))]
    assert ids_of(source, limit=5, sample_seed=1) != ids_of(source, limit=5, sample_seed=0)


def test_the_first_of_fewer_edits_are_all_of_them(tmp_path):
    edits = load_edits(write(tmp_path, numbered(2)))
    assert edits.first(5).requests == edits.first(0).requests == edits.requests


@pytest.mark.parametrize("limit", [0, -3, True, 2.5, "many"])
def test_bad_limit(tmp_path, limit):
    (problem,) = problems_of(write(tmp_path, numbered(2)), limit=limit)
    assert problem == f"limit: expected a whole number of at least 1, or none for all edits, got {limit!r}"


def test_bad_limit_and_seed_are_told_together(tmp_path):
    assert len(problems_of(write(tmp_path, numbered(2)), limit=0, sample_seed="x")) == 2


def test_fingerprint_is_of_the_content(tmp_path):
    own = OWN | {"rephrases": ["Peru's capital is", "Peru is run from"], "ground_truth": "Lima"}
    own["locality"] = [{"prompt": "The seat of Lima's mayor is", "answer": "Lima"}]
    fingerprint = load_edits(write(tmp_path, [own])).fingerprint
    assert len(fingerprint) == 16 and int(fingerprint, 16) >= 0
    assert load_edits(write(tmp_path, [ORIGINAL], "other.json")).fingerprint == fingerprint
    assert load_edits(write(tmp_path, [own | {"id": "x", "relation": "y"}])).fingerprint == fingerprint
    changes = {"target": "Rome", "prompt": "x", "subject": "x", "ground_truth": "x", "rephrases": [], "locality": []}
    for key, value in changes.items():
        assert load_edits(write(tmp_path, [own | {key: value}])).fingerprint != fingerprint, key
    both = [own, OWN]
    assert load_edits(write(tmp_path, both)).fingerprint != load_edits(write(tmp_path, both[::-1])).fingerprint


# --- findings


def findings_of(folder, pairs):
    return load_edits(write(folder, [OWN | {"prompt": prompt, "target": target} for prompt, target in pairs])).findings


def test_a_clean_set_has_nothing_to_say(tmp_path):
    findings = load_edits(write(tmp_path, [OWN])).findings
    assert findings.reachable == 1.0 and findings.sentences() == ()


def test_duplicates_and_contradictions(tmp_path):
    first = [("p", "a cat"), ("p", "The Cat!"), ("p", "dog"), ("q", "x"), ("q", "y"), ("q", "z")]
    findings = findings_of(tmp_path, [*first, ("r", "x"), ("r", "x"), ("s", "x")])
    assert findings.duplicates == 2  # the second cat, the second r
    assert findings.contradictions == 6  # all of p and q
    assert findings.reachable == pytest.approx((2 + 1 + 2 + 1) / 9)
    assert findings.repeated_subjects == 8
    assert findings.sentences()[0] == (
        "6 edits contradict another edit (same prompt, different target), so reliability cannot exceed 66.67%."
    )
    assert findings.sentences()[1] == "2 edits repeat an earlier edit (same prompt, same target)."


def test_a_prompt_in_another_case_is_another_prompt(tmp_path):
    findings = findings_of(tmp_path, [("is US rich", "x"), ("is us rich", "y"), ("is us  rich", "z")])
    assert findings.contradictions == 0 and findings.reachable == 1.0


@FUZZ
@given(pairs=st.lists(st.tuples(st.sampled_from("pqr"), st.sampled_from("xyz")), min_size=1, max_size=9))
def test_reachable_is_the_best_any_model_can_do(tmp_path, pairs):
    findings = findings_of(tmp_path, pairs)
    prompts = sorted({prompt for prompt, _ in pairs})
    best = 0
    for choice in range(3 ** len(prompts)):  # a model gives each prompt one answer: all such models
        answers = {prompt: "xyz"[choice // 3**i % 3] for i, prompt in enumerate(prompts)}
        best = max(best, sum(answers[prompt] == target for prompt, target in pairs))
    assert findings.reachable == pytest.approx(best / len(pairs))
    assert (findings.reachable == 1) == (findings.contradictions == 0)


def test_already_true_knows_every_true_answer(tmp_path):
    records = [
        ZSRE | {"alt": " the lima.", "src": "a"},
        ZSRE | {"alt": "Ciudad de los reyes", "src": "b"},
        ZSRE | {"alt": "Cusco", "src": "c"},
        ZSRE | {"answers": [], "src": "d"},
    ]
    edits = load_edits(write(tmp_path, records))
    assert edits.findings.already_true == 2  # `pred` (Cusco) is no true answer
    assert edits.requests[3].ground_truth is None
    assert load_edits(write(tmp_path, records), limit=1).findings.already_true == 1  # of the selected ones
    assert load_edits(write(tmp_path, records), limit=1).findings.sentences() == (
        "1 edit is already true: the target is among the known true answers.",
    )


def test_a_ceiling_just_below_one_is_not_rounded_to_one(tmp_path):
    assert "reliability cannot exceed 99.99900%." in EditFindings(0, 2, 0, 0, 1 - 1e-5).sentences()[0]


# --- real files


@needs_real
def test_real_zsre():
    edits = load_edits(str(REAL / "zsre_3k.json"))
    raw = json.loads((REAL / "zsre_3k.json").read_text())
    assert edits.layout == "zsre" and len(edits.requests) == len({request.id for request in edits.requests}) == 3000
    assert edits.findings.repeated_subjects == 440
    assert sum(record["alt"].startswith(" ") for record in raw) == 67
    assert all(request.target == request.target.strip() for request in edits.requests)
    assert sum(record["alt"] in record["answers"] for record in raw) == 113
    assert edits.findings.already_true == 117  # four more differ from a true answer only by case, space or punctuation
    assert edits.findings.contradictions == 0 and edits.findings.reachable == 1.0
    assert all(request.locality[0].prompt.startswith("nq question: ") for request in edits.requests)


@needs_real
def test_real_counterfact():
    edits = load_edits(str(REAL / "counterfact_3k.json"))
    assert edits.layout == "counterfact" and len(edits.requests) == 3000
    assert edits.requests[0].id == "1884"
    prompts = [request.prompt for request in edits.requests]
    assert len(prompts) - len(set(prompts)) == 7
    # Five prompts, three with two targets and two with three: 12 edits of which 5 can hold, so 7 are lost.
    assert edits.findings.contradictions == 12
    assert edits.findings.reachable == pytest.approx(2993 / 3000)
    assert edits.findings.duplicates == 0 and edits.findings.already_true == 0


# --- bad input


def test_missing_file(tmp_path):
    write(tmp_path, numbered(1), "zsre_3k.json")
    (problem,) = problems_of(str(tmp_path / "zsre3k.json"))
    assert problem == f"{tmp_path}/zsre3k.json: no such file; did you mean {tmp_path}/zsre_3k.json?"
    (problem,) = problems_of(str(tmp_path / "none" / "zsre.json"))
    assert "no such file" in problem and "none does not exist" in problem


@pytest.mark.parametrize("source", ["atlsa", "x" * 5000, "a\0b", "~nobody-here/y/z", "y" * 3000 + "/b/c.json"])
def test_a_source_of_no_kind_names_the_kinds(source):
    (problem,) = problems_of(source)
    assert "no such file" in problem and "or .parquet file, a hub data set (owner/name), or atlas" in problem


def test_folder_unreadable_and_empty(tmp_path, monkeypatch):
    assert "is a folder, expected a file" in problems_of(str(tmp_path))[0]
    for content in ("", " \n\n", "[]", "\ufeff"):
        assert f"{tmp_path}/edits.json: no records" in only_problem(tmp_path, content, "edits.json")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    source = write(tmp_path, numbered(1))
    monkeypatch.setattr(Path, "read_bytes", refuse)
    (problem,) = problems_of(source)
    assert source in problem and "Permission denied" in problem


def test_not_utf8(tmp_path):
    line = json.dumps(OWN).encode()
    problem = only_problem(tmp_path, line + b"\n" + line.replace(b"Oslo", b"Malm\xf6"))
    offset = len(line) + 1 + line.index(b"Oslo") + 4
    assert "line 2: not UTF-8: byte 0xf6" in problem and f"offset {offset}" in problem


def test_broken_json(tmp_path):
    problem = only_problem(tmp_path, '[\n{"subject": "x",\n "prompt" "y"}]', "edits.json")
    assert f"{tmp_path}/edits.json, line 3, column 11: broken JSON" in problem


def test_broken_lines_and_wrong_fields_are_told_together(tmp_path):
    records = [json.dumps(OWN), '{"subject": ', json.dumps(without(OWN, "target")), "[1]", "[" * 100_000, "9" * 5000]
    problems = problems_of(write(tmp_path, "\n".join(records)))
    assert len(problems) == 5
    for place in ("line 2, column 13: broken JSON", "record 3 (line 3), field target", "line 4", "line 5", "line 6"):
        assert any(place in problem for problem in problems), place


def test_no_list_of_edits(tmp_path):
    assert "keys: data" in only_problem(tmp_path, json.dumps({"data": []}, indent=1), "edits.json")
    for content in ("5", '"text"', "null", "NaN"):
        assert "got" in only_problem(tmp_path, content, "edits.json")


def test_unknown_layout_names_its_keys_and_the_known_ones(tmp_path):
    problem = only_problem(tmp_path, [{"question": "x", "choices": [], "right": "y"}] * 3)
    assert f"{tmp_path}/edits.jsonl, all 3 records: unknown layout, got the keys question, choices, right" in problem
    for name in (*LAYOUTS, "requested_rewrite.prompt", "src, alt", "own (prompt, target)"):
        assert name in problem
    assert f"edits: {{source: {tmp_path}/edits.jsonl, map: {{prompt: question, target: KEY}}}}" in problem
    assert "--map prompt=question --map target=KEY" in problem


@pytest.mark.parametrize(
    ("layout", "field"),
    [
        ("own", "target"),
        ("own", "prompt"),
        ("zsre", "alt"),
        ("zsre", "src"),
        ("counterfact", "target_new"),
        ("wikibigedit", "prompt"),
        ("qaedit", "prompt"),
        ("counterfact-original", "requested_rewrite"),
    ],
)
def test_missing_field(tmp_path, layout, field):
    good = LAYOUTS[layout]
    problem = only_problem(tmp_path, [good | {"id": "a"}, good | {"id": "b"}, without(good, field)])
    assert problem.startswith(f"{tmp_path}/edits.jsonl, record 3 (line 3)") and field in problem
    if field not in ("src", "requested_rewrite"):  # without these, the record is of another layout
        assert f"field {field}: expected text, got no such field (the keys are " in problem


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (OWN | {"target": 5}, "field target: expected text, got a number 5"),
        (OWN | {"target": None}, "field target: expected text, got null"),
        (OWN | {"target": float("nan")}, "field target: expected text, got a number NaN"),
        (OWN | {"target": 10**400}, "field target: expected text, got a number 1000"),
        (OWN | {"prompt": ["x"]}, "field prompt: expected text, got a list"),
        (OWN | {"prompt": ""}, "field prompt: expected text, got an empty text"),
        (OWN | {"target": " \n"}, "field target: expected text, got only whitespace"),
        (OWN | {"rephrases": {"a": "x"}}, "field rephrases: expected text, got an object"),
        (OWN | {"rephrases": ["x", 3]}, "field rephrases[1]: expected text, got a number 3"),
        (OWN | {"rephrases": [""]}, "field rephrases[0]: expected text, got an empty text"),
        (OWN | {"locality": [3]}, "field locality[0]: expected text, got a number 3"),
        (OWN | {"portability": [{"answer": "x"}]}, "field portability[0].prompt: expected text, got no such field"),
        (OWN | {"locality": [{"answer": "x"}]}, "field locality[0].prompt: expected text, got no such field"),
        (
            OWN | {"locality": [{"prompt": "x", "anser": "y"}]},
            "field locality[0].anser: unknown key, did you mean 'answer'?",
        ),
        (OWN | {"ground_truth": False}, "field ground_truth: expected text, got a boolean"),
        (OWN | {"id": 1.5}, "field id: expected text or a whole number, got a number 1.5"),
        (OWN | {"id": ""}, "field id: expected text or a whole number, got an empty text"),
        (OWN | {"rephases": ["x"]}, "field rephases: unknown key, did you mean 'rephrases'?"),
        (without(OWN, "target") | {"Target": "x"}, "field Target: unknown key, did you mean 'target'?"),
        (ZSRE | {"answers": [True]}, "field answers[0]: expected text, got a boolean true"),
        (ZSRE | {"alt": ["x", "y"]}, "field alt: expected text, got a list"),
        (COUNTERFACT | {"target_new": None, "rephrase_prompt": "x"}, "field target_new: expected text, got null"),
        (ORIGINAL | {"requested_rewrite": "x"}, "field requested_rewrite: expected an object, got a string"),
        (
            ORIGINAL | {"requested_rewrite": ORIGINAL["requested_rewrite"] | {"prompt": "The capital"}},
            "expected {} where the subject",
        ),
        (
            ORIGINAL | {"requested_rewrite": without(ORIGINAL["requested_rewrite"], "subject")},
            "requested_rewrite.subject: expected text, got no such field (the keys are prompt, relation_id",
        ),
        (
            ORIGINAL | {"requested_rewrite": ORIGINAL["requested_rewrite"] | {"target_new": {}}},
            "requested_rewrite.target_new.str: exp",
        ),
        (QAEDIT | {"locality": [{"loc": 3}]}, "field locality[0].loc: expected text, got a number 3"),
    ],
)
def test_wrong_type_and_empty_text(tmp_path, record, expected):
    problems = problems_of(write(tmp_path, [record]))
    assert any(
        problem.startswith(f"{tmp_path}/edits.jsonl, record 1 (line 1), field ") and expected in problem
        for problem in problems
    )
    assert len(problems) == (2 if "Target" in record else 1)


def test_notes_of_ones_own_are_welcome(tmp_path):
    notes = {"relation": "capital", "source": "me", "subject_id": 3, "comment": None, "targets_seen": [1], "x": {}}
    assert len(load_edits(write(tmp_path, [OWN | notes])).requests) == 1


def test_mixed_layouts(tmp_path):
    problem = only_problem(tmp_path, [OWN, OWN, ZSRE])
    expected = "expected layout own as elsewhere in the file, got"
    assert f"record 3 (line 3): {expected} layout zsre (it has no prompt, target)" in problem
    problem = only_problem(tmp_path, [{"x": 1}, OWN])
    assert f"record 1 (line 1): {expected} the keys x" in problem


def test_an_id_twice(tmp_path):
    problem = only_problem(tmp_path, [OWN | {"id": "a"}, OWN, OWN | {"id": "a"}])
    assert problem.startswith(f"{tmp_path}/edits.jsonl, record 3 (line 3), field id: expected a unique id, got")
    assert problem.endswith(f'got a string "a", which {tmp_path}/edits.jsonl, record 1 (line 1) already has')


def test_all_problems_of_a_list_with_their_record(tmp_path):
    problems = problems_of(write(tmp_path, [OWN, without(OWN, "target"), OWN | {"prompt": 3}], "edits.json"))
    assert len(problems) == 2
    assert ", record 2, field target:" in problems[0] and ", record 3, field prompt:" in problems[1]


def test_many_problems_are_told_shortly(tmp_path):
    problems = problems_of(write(tmp_path, [OWN, *[OWN | {"target": 1}] * 1000]))
    assert len(problems) == 21 and problems[-1] == "... and 980 more problems"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
keys = sorted({key for record in LAYOUTS.values() for key in record} | {"rephrases", "ground_truth"})
keys += ["Prompt", "rephrased", "\ud800"]


@FUZZ
@given(
    base=st.sampled_from(list(LAYOUTS.values())),
    changes=st.dictionaries(st.sampled_from(keys), json_values, max_size=4),
    more=st.lists(json_values, max_size=2),
    name=st.sampled_from(["a.json", "a.jsonl"]),
)
def test_no_record_crashes(tmp_path, base, changes, more, name):
    try:
        edits = load_edits(write(tmp_path, [base | changes, *more], name))
    except InputError as error:
        assert error.problems and all(isinstance(problem, str) for problem in error.problems)
        "\n".join(error.problems).encode()  # printable anywhere
    else:
        assert all(request.prompt and request.target for request in edits.requests)


# --- hub data sets


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the data set library: `hub.splits` are what the hub has, `hub.asked` what was asked for."""
    stub = types.ModuleType("datasets")
    stub.splits, stub.asked = {}, []

    def load_dataset(name, config, split=None):
        stub.asked.append((name, split))
        if not stub.splits:
            raise ConnectionError(f"Couldn't reach {name!r} on the Hub\nsecond line")
        return stub.splits if split is None else stub.splits[split]

    stub.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", stub)
    return stub


def test_hub_data_set(hub):
    hub.splits = {"train": [OWN, OWN | {"prompt": "x"}], "test": [ZSRE]}
    assert len(load_edits("owner/edits:train").requests) == 2
    assert load_edits("owner/edits:test").layout == "zsre"
    assert "owner/edits:train, owner/edits:test" in problems_of("owner/edits")[0]
    hub.splits = {"only": [OWN | {"rephrases": None}]}
    assert load_edits("owner/edits").source == "owner/edits"
    assert hub.asked[0] == ("owner/edits", "train")


def test_hub_problems(hub, tmp_path, monkeypatch):
    (problem,) = problems_of("owner/edits:train")
    for part in (
        "owner/edits:train: no such file", "hub", "split train", "ConnectionError: Couldn't reach",
        "local file with its records", "HF_HUB_OFFLINE",
    ):  # fmt: skip
        assert part in problem
    hub.splits = {"train": [OWN | {"target": 3}], "none": []}
    told = "owner/edits:train, record 1, field target: expected text, got a number 3"
    assert problems_of("owner/edits:train")[0] == told
    assert "no records" in problems_of("owner/edits:none")[0]
    assert "KeyError" in problems_of("owner/edits:test")[0]
    hub.asked.clear()
    monkeypatch.chdir(tmp_path)
    problems_of("owner/edits.json")
    assert hub.asked == []  # a name with a file's ending is a file


def test_reading_edits_needs_neither_torch_nor_datasets():
    code = "import sys, locft.data.requests; sys.exit(bool({'torch', 'datasets', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[3], check=True)
