"""The real data sets and tokenizers, where FEDMIRA_TEST_DATA has them."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fedmira.data.batches import Truncation
from fedmira.data.encode import encode_client
from fedmira.data.formats import Record, read_records
from fedmira.data.partition import Client, form_clients
from fedmira.data.templates import ALPACA

Find = Callable[[str], Path]


def read(path: Path, **options: object) -> tuple[str, list[Record]]:
    reading = read_records(path, **options)  # type: ignore[arg-type]
    return reading.format, reading.records


def test_the_slice_of_110_tasks_is_110_clients_of_120_examples(shared_file: Find) -> None:
    name, records = read(shared_file("data/natural_instructions/tasks.jsonl.gz"))
    clients = form_clients(records, by="task", groups="category")
    assert (name, len(records), len(clients)) == ("natural_instructions", 13_200, 110)
    assert {(len(c.train), len(c.validation), len(c.test)) for c in clients} == {(96, 12, 12)}
    assert set(Counter(client.group for client in clients).values()) == {10}
    assert all(client.id == client.name for client in clients)


def test_a_folder_reads_as_the_file_in_it(shared_file: Find) -> None:
    _, inside = read(shared_file("data/natural_instructions"))
    _, alone = read(shared_file("data/natural_instructions/tasks.jsonl.gz"))
    assert [record.answers for record in inside] == [record.answers for record in alone]


def test_the_slice_of_555_tasks_is_555_clients_of_24_examples(shared_file: Find) -> None:
    _, records = read(shared_file("data/natural_instructions_555/tasks.jsonl.gz"))
    clients = form_clients(records, by="task", groups="category")
    assert len(clients) == 555
    assert {len(c.train) + len(c.validation) + len(c.test) for c in clients} == {24}


def test_dolly_is_80_clients_and_a_fifth_of_it_can_be_taken(shared_file: Find) -> None:
    name, records = read(shared_file("data/dolly/databricks-dolly-15k.jsonl.gz"))
    clients = form_clients(records, by="category", per_group=10)
    thinned = form_clients(records, by="category", per_group=10, subsample=0.2)
    assert (name, len(records), len(clients)) == ("dolly", 15_011, 80)
    assert sum(len(c.train) + len(c.validation) + len(c.test) for c in clients) == 15_011
    assert abs(sum(len(c.train) + len(c.validation) + len(c.test) for c in thinned) - 15_011 / 5) < 80
    assert set(Counter(client.group for client in clients).values()) == {10}


def test_questions_and_answers_are_read_as_they_come(shared_file: Find) -> None:
    path = shared_file("data/gsm8k/train.jsonl.gz")
    found = read(path)
    assert (found[0], len(found[1])) == ("prompt_completion", 7_473)
    assert found == read(path, columns={"prompt": "question", "completion": "answer"})


def test_classifications_are_read_by_naming_their_columns(shared_file: Find) -> None:
    path = shared_file("data/text_classification_13/train.jsonl.gz")
    name, records = read(path, columns={"prompt": "input", "completion": "output"})
    assert (name, len(records)) == ("prompt_completion", 7_249)
    assert len({record.columns["task"] for record in records}) == 13


@pytest.mark.parametrize(("model", "first"), [("stories260K", 1), ("nano", None), ("gpt2_tokenizer", None)])
def test_real_tokenizers_end_examples_and_keep_their_first_token(
    shared_file: Find, model: str, first: int | None
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_file(f"models/{model}"))
    _, records = read(shared_file("data/natural_instructions/tasks.jsonl.gz"))
    for client in form_clients(records, by="task", first=3):
        data = encode_client(client, tokenizer, template=ALPACA, max_length=200)
        for example, record in zip(data.train, client.train, strict=True):
            prompt = ALPACA.render(record).question
            asked, whole = (tokenizer(text)["input_ids"] for text in (prompt, prompt + record.answers[0]))
            assert list(example.ids[example.prompt_length :]) == [*whole[len(asked) :], tokenizer.eos_token_id]
            assert len(example.ids) <= 200
            assert first is None or example.ids[0] == first


def test_the_prompt_before_the_answer_decodes_to_the_template(shared_file: Find) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_file("models/nano"))
    _, records = read(shared_file("data/natural_instructions/tasks.jsonl.gz"))
    [client] = form_clients(records, by="task", first=1)
    example = encode_client(client, tokenizer, template=ALPACA, max_length=512).train[0]
    text = tokenizer.decode(example.ids[: example.prompt_length])
    assert text.startswith("Below is an instruction that describes a task, paired with an input")
    assert text.endswith("### Response:\n")


@pytest.mark.slow
def test_truncation_is_counted_on_a_part_of_dolly(shared_file: Find) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_file("models/nano"))
    _, records = read(shared_file("data/dolly/databricks-dolly-15k.jsonl.gz"))
    records = records[::8]  # tokenising is nearly all of the time
    everyone = Client("all", "all", None, {}, tuple(records), (), ())
    data = encode_client(everyone, tokenizer, template=ALPACA, max_length=512)
    answers = tokenizer([record.answers[0] for record in records], add_special_tokens=False)["input_ids"]
    longer = sum(len(answer) + 1 > 511 for answer in answers)  # answer and end of text, beside one prompt token
    assert data.truncation.answers_cut == longer
    assert data.truncation.prompts_cut >= longer
    assert data.truncation == Truncation(1_877, data.truncation.prompts_cut, longer, 0)
    assert max(len(example.ids) for example in data.train) == 512
