"""Edit files as people publish them: whatever the layout, each key is read or named, and near misses are read or explained."""

import csv
import json
from pathlib import Path

import pytest

from locft.data.edit_request import LocalityPrompt, PortabilityPrompt
from locft.data.field_map import read_field_map
from locft.data.requests import load_edits, own_record
from locft.errors import InputError
from tests.locft.data.test_requests import LAYOUTS, OWN, only_problem, write

KNOWEDIT = {"subject": "Peru", "prompt": "The capital of Peru is", "target_new": "Oslo"}
REWRITE = {"prompt": "The capital of {} is", "target_new": {"str": "Oslo", "id": "Q585"}, "subject": "Peru"}


def load(folder, records, name="edits.jsonl", **options):
    return load_edits(write(folder, records, name), **options)


def one(folder, record, **options):
    (request,) = load(folder, [record], **options).requests
    return request


def table(folder, records, name):
    with open(folder / name, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]), delimiter="\t" if name.endswith("tsv") else ",")
        writer.writeheader()
        writer.writerows(records)
    return str(folder / name)


def unread_sentence(edits):
    return next((sentence for sentence in edits.sentences() if sentence.startswith("Not read")), "")


# --- forms of rephrases and questions


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "key", ["rephrases", "rephrase", "rephrase_prompt", "paraphrase_prompts", "para_question1", "paraphrased_questions"]
)
@pytest.mark.parametrize("value", ["again", ["again"], ["again", "and again"]])
def test_rephrases_under_any_name_in_any_layout(tmp_path, layout, key, value):
    without = {
        k: v for k, v in LAYOUTS[layout].items() if k not in ("rephrase", "rephrase_prompt", "paraphrase_prompts")
    }
    kept = {"rephrase": "r"} if layout == "qaedit" else {"rephrase_prompt": "r"} if layout == "wikibigedit" else {}
    found = one(tmp_path, {**without, **kept, key: value}).rephrases
    assert set([value] if isinstance(value, str) else value) <= set(found)


def test_several_names_of_rephrases_in_one_record_all_count(tmp_path):
    record = OWN | {"para_question": "a", "para_question1": "b", "para_question2": "c", "rephrase": ["d", "e"]}
    assert sorted(one(tmp_path, record).rephrases) == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize(
    "locality",
    [
        [{"prompt": "x", "answer": "y"}, {"prompt": "z", "answer": None}],
        [{"question": "x", "ground_truth": ["y", "Y"]}, "z"],
        {"Relation": [{"prompt": "x", "ground_truth": [["y"]]}], "Other": [{"prompt": "z"}], "None": []},
        {"hop": {"prompt": ["x", "z"], "ground_truth": ["y", None]}},
        [{"loc": "x", "loc_ans": "y", "metric": "m"}, {"loc": "z", "loc_ans": ""}],
    ],
)
@pytest.mark.parametrize("base", [OWN, KNOWEDIT])
def test_locality_in_lists_and_groups(tmp_path, base, locality):
    if base is OWN:  # where blank texts are told, and unknown keys are the user's
        locality = json.loads(json.dumps(locality).replace('""', "null"))
    found = one(tmp_path, base | {"locality": locality}).locality
    assert found == (LocalityPrompt("x", "y"), LocalityPrompt("z", None))


@pytest.mark.parametrize(
    "fields",
    [
        {"loc_prompt": "x", "loc_ans": "y"},
        {"loc": ["x"], "loc_ans": ["y"]},
        {"locality_prompt": "x", "locality_ground_truth": "y"},
        {"locality_question": "x", "locality_answer": "y"},
        {"locality_prompts": ["x"], "locality_answers": ["y"]},
    ],
)
def test_locality_in_pairs_of_keys(tmp_path, fields):
    assert one(tmp_path, KNOWEDIT | fields).locality == (LocalityPrompt("x", "y"),)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"portability": [{"prompt": "x", "answer": "y"}]}, [("x", ("y",))]),
        ({"portability": {"A": [{"prompt": "x", "ground_truth": [["y", "Y"]]}], "B": [{"prompt": "w", "ground_truth": "v"}]}},
         [("x", ("y", "Y")), ("w", ("v",))]),
        ({"portability": {"hop": {"prompt": ["x", "w"], "ground_truth": ["y", ["v", "V"]]}}}, [("x", ("y",)), ("w", ("v", "V"))]),
        ({"portability": {"Recalled Relation": "", "New Question": "x", "New Answer": "y"}}, [("x", ("y",))]),
        ({"mhop": "x", "mhop_ans": "y"}, [("x", ("y",))]),
        ({"sub_question": ["x", "w"], "sub_answer": ["y", "v"]}, [("x", ("y",)), ("w", ("v",))]),
        ({"questions": ["x", "w"], "new_answer": "y", "new_answer_alias": ["Y"]}, [("x", ("y", "Y")), ("w", ("y", "Y"))]),
        ({"question_2hop": "x", "answer_2hop": 80}, [("x", ("80",))]),
        ({"portability": []}, []),
    ],
)  # fmt: skip
def test_portability(tmp_path, fields, expected):
    edits = load(tmp_path, [KNOWEDIT | fields])
    assert edits.requests[0].portability == tuple(PortabilityPrompt(*pair) for pair in expected)
    assert unread_sentence(edits) in ("", "Not read: portability.Recalled Relation (1 of 1 records).")


def test_a_question_of_portability_without_an_answer_is_named_as_unread(tmp_path):
    edits = load(tmp_path, [KNOWEDIT | {"portability": [{"prompt": "x"}, {"prompt": "w", "answer": "v"}]}])
    assert edits.requests[0].portability == (PortabilityPrompt("w", ("v",)),)
    assert load(tmp_path, [KNOWEDIT | {"portability": [{"prompt": "x"}]}]).unread == {"portability": 1}


def test_answers_that_do_not_match_their_prompts_are_told(tmp_path):
    record = KNOWEDIT | {"portability": {"hop": {"prompt": ["x", "w", "z"], "ground_truth": ["y", "v"]}}}
    expected = "field portability.hop.ground_truth: expected 3 answers, one for each of prompt, got a list"
    assert expected in only_problem(tmp_path, [record])


def test_portability_is_part_of_the_content_only_where_there_is_some(tmp_path):
    plain, empty = load(tmp_path, [KNOWEDIT]), load(tmp_path, [KNOWEDIT | {"portability": []}])
    asked = load(tmp_path, [KNOWEDIT | {"portability": [{"prompt": "x", "answer": "y"}]}])
    assert plain.fingerprint == empty.fingerprint != asked.fingerprint


@pytest.mark.parametrize("key", ["ground_truth", "target_true", "target_old"])
@pytest.mark.parametrize("value", ["Lima", ["Lima", "Ciudad"], [["Lima"], ["Ciudad"]], {"str": "Lima", "id": "Q"}])
def test_true_answers_in_any_form(tmp_path, key, value):
    edits = load(tmp_path, [KNOWEDIT | {key: value}])
    assert edits.requests[0].ground_truth == "Lima"
    same = load(tmp_path, [KNOWEDIT | {key: value, "target_new": "Ciudad" if isinstance(value, list) else "lima."}])
    assert same.findings.already_true == 1
    assert load(tmp_path, [KNOWEDIT | {key: None}]).requests[0].ground_truth is None


# --- layouts


@pytest.mark.parametrize(
    ("record", "layout", "prompt", "target"),
    [
        ({"prompt": "p", "target_new": "t", "target_old": None, "fact_id": "f"}, "knowedit", "p", "t"),
        ({"prompt": "The {} is", "subject": "sky", "target_new": {"str": "t"}}, "knowedit", "The sky is", "t"),
        ({"prompt": "The {} is", "subject": "sky", "target": "t"}, "own", "The sky is", "t"),
        ({"prompt": "The sky, {}, is", "subject": "sky", "target": "t"}, "own", "The sky, {}, is", "t"),
        ({"prompt": "{} and {}", "subject": "sky", "target": "t"}, "own", "{} and {}", "t"),
        (
            {"instruction": "Is {}", "input": "blue?", "subject": "sky", "output": "t"},
            "instruction",
            "Is sky\nblue?",
            "t",
        ),
        (
            {"prompt": "order {{Number}}", "subject": "s", "target_new": "{{N}}"},
            "knowedit",
            "order {{Number}}",
            "{{N}}",
        ),
        ({"question": "p", "answer": "t"}, "question-answer", "p", "t"),
        ({"instruction": "p", "input": "", "output": "t"}, "instruction", "p", "t"),
        ({"instruction": "p", "input": "more", "output": "t"}, "instruction", "p\nmore", "t"),
        ({"question": "p", "ground_truth": "g", "target_new": "t"}, "question-target", "p", "t"),
        ({"text": "p", "labels": "t", "concept": "c"}, "wikibio", "p", "t"),
        ({"update": "p", "ans": "t", "subject": "c"}, "wikibigedit-qa", "p", "t"),
        ({"subject": "s", "relation": "r", "object": "t", "question": "p"}, "hallueditbench", "p", "t"),
        ({"prompt": "p", "target": "t"}, "own", "p", "t"),
    ],
)
def test_layouts_that_people_publish(tmp_path, record, layout, prompt, target):
    edits = load(tmp_path, [record])
    assert edits.layout == layout
    assert (edits.requests[0].prompt, edits.requests[0].target) == (prompt, target)


@pytest.mark.parametrize("target", ["target", "target_new"])
def test_the_subject_takes_its_place_in_rephrases(tmp_path, target):
    record = {"subject": "Peru", "prompt": "p", target: "t", "rephrases": ["{}'s capital", "Of Peru, {}", "{} {}"]}
    assert one(tmp_path, record).rephrases == ("Peru's capital", "Of Peru, {}", "{} {}")
    record = {"requested_rewrite": REWRITE, "paraphrase_prompts": ["{} is run from"]}
    assert one(tmp_path, record).rephrases == ("Peru is run from",)


def test_edits_need_no_subject_and_none_is_no_common_subject(tmp_path):
    records = [{"prompt": f"p{i}", "target": "t"} for i in range(3)]
    edits = load(tmp_path, records)
    assert {request.subject for request in edits.requests} == {""} and edits.findings.repeated_subjects == 0


def test_several_edits_in_one_record(tmp_path):
    second = REWRITE | {"subject": "Chile", "question": "Chile's capital?", "relation_id": "P36"}
    record = {
        "case_id": 7, "requested_rewrite": [REWRITE, second], "questions": ["Whose?", "Who?"], "new_answer": "Ann",
        "new_answer_alias": ["A."], "orig": {"x": 1},
    }  # fmt: skip
    edits = load(tmp_path, [record, record | {"case_id": 8}])
    assert [request.id for request in edits.requests] == ["7", "7#2", "8", "8#2"]
    first, chile = edits.requests[:2]
    assert chile.prompt == "The capital of Chile is" and chile.rephrases == ("Chile's capital?",)
    assert first.portability == (PortabilityPrompt("Whose?", ("Ann", "A.")), PortabilityPrompt("Who?", ("Ann", "A.")))
    assert chile.portability == ()
    assert edits.unread == {"requested_rewrite[].target_new.id": 2, "requested_rewrite[].relation_id": 2, "orig": 2}


def test_problems_of_several_edits_in_one_record_have_their_place(tmp_path):
    problem = only_problem(
        tmp_path, [{"requested_rewrite": [REWRITE, REWRITE | {"target_new": 3.5}]}, {"requested_rewrite": REWRITE}]
    )
    assert "record 1 (line 1), field requested_rewrite[1].target_new: expected text, got a number 3.5" in problem
    assert "field requested_rewrite[0]: expected an object" in only_problem(tmp_path, [{"requested_rewrite": ["x"]}])


def test_a_file_of_results_is_refused_with_the_reason(tmp_path):
    record = {"pre": {}, "requested_rewrite": REWRITE | {"prompt": "The capital of Peru is"}, "post": {}}
    problem = only_problem(tmp_path, [record, record])
    assert "all 2 records, field requested_rewrite.prompt: expected {} where the subject goes" in problem
    assert "already filled in" in problem


# --- what is not read


def test_what_is_not_read_is_named_once_with_its_count(tmp_path):
    records = [KNOWEDIT | {"note": 1, "locality": [{"prompt": "x", "metric": "m"}], "deep": {"a": {"b": 1}}}] * 2
    edits = load(tmp_path, [*records, KNOWEDIT | {"note": "x", "empty": []}])
    assert edits.unread == {"note": 3, "locality[].metric": 2, "deep": 2}
    assert edits.sentences()[-1] == "Not read: note (3 of 3 records); locality[].metric, deep (2 of 3 records)."
    assert edits.sentences()[:-1] == edits.findings.sentences()
    assert load(tmp_path, [OWN]).sentences() == () and load_edits("atlas").unread == {}


# --- wrapped records


def test_records_in_an_object_are_unwrapped(tmp_path):
    wrapped = {"dataset": "mine", "num_records": 2, "records": [KNOWEDIT, KNOWEDIT | {"prompt": "q"}]}
    for name, text in {
        "a.json": json.dumps(wrapped, indent=1),
        "b.jsonl": json.dumps(wrapped),
        "c.json": json.dumps({"data": wrapped}),
        "d.json": json.dumps({"first": KNOWEDIT, "second": KNOWEDIT | {"prompt": "q"}}),
    }.items():
        edits = load(tmp_path, text, name)
        assert [request.prompt for request in edits.requests] == [KNOWEDIT["prompt"], "q"]
        assert ("dataset, num_records (beside the records)" in unread_sentence(edits)) == (name != "d.json")


def test_keys_of_records_in_an_object_are_their_ids(tmp_path):
    own = {"prompt": "p", "target": "t"}
    for records, ids in (
        ({"q1": own, "q2": own | {"prompt": "q"}}, ["q1", "q2"]),
        ({"q1": own | {"id": "mine"}, "q2": own | {"case_id": 7}}, ["mine", "7"]),
    ):
        edits = load(tmp_path, json.dumps(records), "a.json")
        assert [request.id for request in edits.requests] == ids and not edits.unread


def test_questions_without_an_answer_are_told(tmp_path):
    asked = {"prompt": "Who rules it?", "answer": "Harald"}
    mixed = [asked, {"prompt": "Where is it?"}, "What is it?"]
    lists = {"questions": ["one", "two"], "new_answer": ["x", ""]}
    for record, kept, told in (
        ({"portability": mixed}, 1, {"portability[].prompt without an answer", "portability[]"}),
        ({"portability": [asked]}, 1, set()),
        ({"portability": mixed[1:2]}, 0, {"portability"}),
        ({"locality": mixed[1:2]}, 0, set()),
    ):
        edits = load(tmp_path, [{"prompt": "p", "target": "t"} | record, {"prompt": "q", "target": "t"}])
        assert len(edits.requests[0].portability) == kept and set(edits.unread) == told
    edits = load(tmp_path, [KNOWEDIT | {"sub_question": lists["questions"], "sub_answer": lists["new_answer"]}])
    assert len(edits.requests[0].portability) == 1
    assert "sub_question[] without an answer (1 of 1 records)" in unread_sentence(edits)


def test_one_record_is_a_file_of_one(tmp_path):
    record = KNOWEDIT | {"locality": [{"prompt": "x"}, {"prompt": "y"}]}
    for name, indent in (("a.json", 1), ("b.json", None), ("c.jsonl", None), ("d.jsonl", 2)):
        (request,) = load(tmp_path, json.dumps(record, indent=indent), name).requests
        assert len(request.locality) == 2


def test_the_only_list_of_edits_in_an_object_is_read(tmp_path):
    edits = load(tmp_path, json.dumps({"authors": [{"name": "x"}], "edits": [KNOWEDIT]}), "a.json")
    assert len(edits.requests) == 1 and edits.unread == {"authors": 0}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"PAR1\x15", "got a parquet file, expected its name to end in .parquet"),
        (b"PK\x03\x04\x14", "got a spreadsheet or a zip archive; save it as CSV"),
        (b"\x1f\x8b\x08", "got a compressed file; unpack it"),
    ],
)
def test_files_that_are_no_text_are_told_apart(tmp_path, content, problem):
    assert problem in only_problem(tmp_path, content, "a.json")


def test_a_target_may_be_a_list_of_one(tmp_path):
    assert one(tmp_path, KNOWEDIT | {"target_new": ["Oslo"]}).target == "Oslo"
    problem = only_problem(tmp_path, [KNOWEDIT | {"target_new": ["Oslo", "Rome"]}, KNOWEDIT])
    assert "record 1 (line 1), field target_new: expected text, got a list" in problem


def test_a_record_that_lacks_its_prompt_is_no_wrapper_of_its_questions(tmp_path):
    record = {"promt": "p", "target": "t", "locality": [{"prompt": "x", "answer": "y"}]}
    for name in ("a.json", "a.jsonl"):
        assert "unknown layout, got the keys promt, target, locality" in only_problem(
            tmp_path, json.dumps(record), name
        )


def test_two_lists_in_an_object_are_named(tmp_path):
    problem = only_problem(tmp_path, json.dumps({"success": [KNOWEDIT] * 2, "locality": [KNOWEDIT]}), "a.json")
    assert "2 lists of records, success (2), locality (1); save the one you want to a file of its own" in problem


# --- tables


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_tables(tmp_path, name):
    rows = [
        {"case_id": "1", "subject": "Peru", "prompt": "p, q", "target_new": "550,000", "ground_truth": "2",
         "rephrase": '["a", "b"]', "locality_prompt": "x", "locality_ground_truth": ""},
        {"case_id": "", "subject": "", "prompt": "p2", "target_new": "-40%", "ground_truth": "", "rephrase": "['c', 'd']",
         "locality_prompt": "", "locality_ground_truth": ""},
    ]  # fmt: skip
    edits = load_edits(table(tmp_path, rows, name))
    first, second = edits.requests
    assert (first.id, first.prompt, first.target, first.ground_truth) == ("1", "p, q", "550,000", "2")
    assert first.rephrases == ("a", "b") and first.locality == (LocalityPrompt("x", None),)
    assert (second.target, second.rephrases, second.subject, second.locality) == ("-40%", ("c", "d"), "", ())
    assert edits.unread == {}


def test_lists_and_objects_in_the_cells_of_a_table(tmp_path):
    row = {"prompt": "p", "target_new": "['t']", "target_true": "['a', 'b']", "para_question1": '["r", "[s] t"]'}
    edits = load_edits(table(tmp_path, [row, row | {"para_question1": "[Question] Who"}], "a.csv"))
    first, second = edits.requests
    assert (first.target, first.ground_truth, first.rephrases) == ("t", "a", ("r", "[s] t"))
    assert edits.truths[0] == ("a", "b") and second.rephrases == ("[Question] Who",)
    rows = [{"case_id": "1", "requested_rewrite": str(REWRITE), "paraphrase_prompts": "[]"}]
    assert load_edits(table(tmp_path, rows, "b.csv")).requests[0].prompt == "The capital of Peru is"
    row = {"question": "p", "new": '{"text": "t"}', "near": '[{"text": "x", "reply": "y"}]', "answer": "[1, 2]"}
    locality = {"prompt": "near[].text", "answer": "near[].reply"}
    for target, text in (("new.text", "t"), ("answer", "[1, 2]")):
        fields = read_field_map({"prompt": "question", "target": target, "locality": locality})
        (request,) = load_edits(table(tmp_path, [row], "c.csv"), fields=fields).requests
        assert request.target == text and request.locality == (LocalityPrompt("x", "y"),)


@pytest.mark.parametrize(
    "cell",
    ["['What is A?' 'Tell me B']", "['a'\n \"b\"]", "['a', nan]", "[{'prompt': 'a'}\n {'prompt': 'b'}]",
     "{'a': array(['b'], dtype=object)}", "[array(['a'], dtype=object)]", "[nan 'a']", "[1 2]", "['cut off"],
)  # fmt: skip
def test_a_list_that_is_not_written_as_one_is_refused_where_it_is_read(tmp_path, cell):
    row = {"prompt": "p", "target": "t", "rephrases": cell}
    problem = only_problem(
        tmp_path, Path(table(tmp_path, [row, row | {"rephrases": "['a']"}], "a.csv")).read_text(), "b.csv"
    )
    assert "record 1 (line 2), field rephrases: expected text, got a list or an object that cannot be parsed" in problem
    assert "save the table as JSON Lines or parquet" in problem
    edits = load_edits(table(tmp_path, [{"prompt": "p", "target": "t", "answers": cell}], "c.csv"))
    assert edits.unread == {"answers": 1}


def test_parquet_is_read_as_json_is(tmp_path):
    import pyarrow
    import pyarrow.parquet

    records = [
        KNOWEDIT | {"id": 1, "rephrases": ["a"], "locality": [{"prompt": "x", "answer": None}]},
        KNOWEDIT | {"id": 2},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    assert load_edits(str(tmp_path / "a.parquet")).requests == load(tmp_path, records).requests


def test_a_table_that_is_none(tmp_path):
    assert "cannot be read as parquet" in only_problem(tmp_path, b"no", "a.parquet")
    assert "line 2: 3 cells, but the header has 2" in only_problem(tmp_path, "prompt,target\na,b,c\n", "a.csv")
    assert "unknown layout, got the keys a, b" in only_problem(tmp_path, "a,b\n1,2\n", "a.csv")
    assert "line 1: the header names target more than once" in only_problem(
        tmp_path, "prompt,target,target\np,t,u\n", "a.csv"
    )


@pytest.mark.parametrize("answer", [[], None, " ", [[" "]]])
def test_a_question_without_an_answer_is_not_read(tmp_path, answer):
    question = {"prompt": "x", "ground_truth": answer}
    edits = load(tmp_path, [{"prompt": "p", "target_new": "t", "portability": {"Reasoning": [question]}}])
    assert edits.requests[0].portability == () and "portability" in next(iter(edits.unread))


# --- a map


def test_a_map_reads_what_no_layout_knows(tmp_path):
    record = {
        "q": "p", "new": {"text": "t"}, "who": "Peru", "nr": 3, "old": ["Lima"], "q1": "a", "q2": ["b", "c"],
        "near": [{"say": "x", "hear": "y"}], "hops": ["h"], "hop_answers": ["k"], "rest": 1,
    }  # fmt: skip
    fields = read_field_map({
        "prompt": "q", "target": "new.text", "subject": "who", "id": "nr", "ground_truth": "old", "rephrases": ["q1", "q2"],
        "locality": {"prompt": "near[].say", "answer": "near[].hear"}, "portability.prompt": "hops",
        "portability.answer": "hop_answers",
    })  # fmt: skip
    edits = load(tmp_path, [record], fields=fields)
    (request,) = edits.requests
    assert (request.id, request.subject, request.prompt, request.target) == ("3", "Peru", "p", "t")
    assert request.ground_truth == "Lima" and request.rephrases == ("a", "b", "c")
    assert request.locality == (LocalityPrompt("x", "y"),) and request.portability == (PortabilityPrompt("h", ("k",)),)
    assert edits.layout == "map" and edits.unread == {"rest": 1}


def test_a_map_beside_a_known_layout(tmp_path):
    edits = load(tmp_path, [KNOWEDIT | {"others": ["a"]}], fields={"rephrases": ("others",)})
    assert edits.layout == "knowedit" and edits.requests[0].rephrases == ("a",)


def test_a_map_pairs_prompts_with_answers(tmp_path):
    record = {"q": "p", "a": "t", "q1": "x", "q2": "y", "a1": "X", "a2": "Y"}
    shared = {"prompt": "q", "target": "a"}

    def asked(prompts, answers):
        fields = read_field_map(shared | {"portability": {"prompt": prompts, "answer": answers}})
        return [(one.prompt, one.answers) for one in load(tmp_path, [record], fields=fields).requests[0].portability]

    assert asked(["q1", "q2"], ["a1", "a2"]) == [("x", ("X",)), ("y", ("Y",))]
    assert asked("q1", ["a1", "a2"]) == [("x", ("X", "Y"))]
    assert asked(["q1", "q2"], "a1") == [("x", ("X",)), ("y", ("X",))]


def test_a_map_of_keys_that_are_not_there(tmp_path):
    with pytest.raises(InputError) as caught:
        load(tmp_path, [{"quest": "p", "answr": "t"}], fields={"prompt": ("question",), "target": ("answr",)})
    assert caught.value.problems[0].endswith(
        "map: prompt: no record has question (the keys are quest, answr; did you mean quest?)"
    )


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"promt": "q"}, "got the field promt, expected one of prompt, target, subject"),
        ({"prompt": 3}, "prompt: got 3, expected a key or a list of keys"),
        ({"prompt": []}, "prompt: got []"),
        ({"prompt": ["a", "b"]}, "prompt: got 2 keys, expected one"),
        ({"locality": {"question": "q"}}, "got the field locality.question"),
        ("prompt", "got 'prompt', expected a mapping of fields to keys"),
        ({"locality": {"answer": "a"}}, "locality.answer: also needs the key of its prompts, locality.prompt"),
        ({"portability": "p", "portability.prompt": "q"}, "got both portability and portability.prompt"),
        (
            {"locality": {"prompt": ["p", "q", "r"], "answer": ["a", "b"]}},
            "locality.answer: got 2 answer keys for 3 prompt keys, expected one key, or one per prompt key",
        ),
    ],
)
def test_a_wrong_map(value, problem):
    with pytest.raises(InputError) as caught:
        read_field_map(value)
    assert any(problem in told for told in caught.value.problems)


# --- our own layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_in_our_own_layout_is_the_same_set(tmp_path, layout):
    record = LAYOUTS[layout] | {"portability": [{"prompt": "x", "answer": ["y", "z"]}, {"prompt": "v", "answer": "w"}]}
    read = load(tmp_path, [record])
    again = load(tmp_path, [own_record(*pair) for pair in zip(read.requests, read.truths, strict=True)], "own.jsonl")
    assert again.layout == "own" and again.requests == read.requests
    assert (again.fingerprint, again.findings, again.truths) == (read.fingerprint, read.findings, read.truths)
