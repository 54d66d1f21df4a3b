"""Templates: what is shown, what is trained on, and that conversations come out as transformers itself renders them."""

from copy import deepcopy
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fedmira.data.batches import NO_LOSS, Encoded, collate
from fedmira.data.encode import encode_client
from fedmira.data.formats import Record, Turn
from fedmira.data.partition import Client
from fedmira.data.templates import ALPACA, CHATS, NONE, Template, make_template
from fedmira.errors import DataError

CHATML = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
# as Qwen3: an empty thought stands before the last answer only, and is not part of the prompt that asks
THINKS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content.strip() }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# as Llama 2: no prompt that asks, BOS and EOS around each exchange, and a refusal of other orders
INST = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user and assistant') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TALK = (Turn("user", "How do you do?"), Turn("assistant", "Well, thanks."), Turn("user", "And now?"))
WORDS = ["How do you do? Well, thanks. And now? As before. system user assistant be brief [INST] [/INST]"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with tokens of its own for turns."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        WORDS * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", extra_special_tokens=["<|start|>", "<|end|>"]
    )


def talk(*turns: Turn, answer: str = "As before.") -> Record:
    return Record("", "", (answer,), {}, "talks.jsonl:7", turns or TALK)


def request(instruction: str, given: str = "") -> Record:
    return Record(instruction, given, ("yes",), {}, "rows.jsonl:3")


def chat(tokenizer: PreTrainedTokenizerFast, source: str) -> Template:
    tokenizer.chat_template = source
    return make_template("chat", usual="chat", tokenizer=tokenizer)


def encode(record: Record, template: Template, tokenizer: PreTrainedTokenizerFast, *, max_length: int = 400) -> Encoded:
    client = Client("c", "c", None, {}, (record,), (record,), ())
    return encode_client(client, tokenizer, template=template, max_length=max_length).validation[0]


def labelled(one: Encoded, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(one.ids[start:stop]) for start, stop in one.labelled]


def file(folder: Path, text: str) -> str:
    path = folder / "own.jinja"
    path.write_text(text, encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------- single requests


def test_the_alpaca_prompt_with_an_input() -> None:
    assert ALPACA.render(request("Add.", "1 2")).question == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )


@pytest.mark.parametrize("nothing", ["", " \n"])
def test_the_alpaca_prompt_without_an_input(nothing: str) -> None:
    assert ALPACA.render(request("Sing {x}.", nothing)).question == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSing {x}.\n\n### Response:\n"
    )


def test_no_template_is_the_instruction_and_the_input_on_its_own_line() -> None:
    assert NONE.render(request("Add.", "1 2")).question == "Add.\n1 2"
    assert NONE.render(request("Add.")).question == "Add."


def test_auto_is_the_usual_template_of_the_format(tokenizer: PreTrainedTokenizerFast) -> None:
    assert make_template("auto", usual="alpaca", tokenizer=tokenizer) is ALPACA
    assert make_template("auto", usual="none", tokenizer=tokenizer) is NONE
    assert make_template("none", usual="alpaca", tokenizer=tokenizer) is NONE


def test_an_unknown_template_suggests_the_nearest(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"'alpca' is neither a template nor a file \(did you mean 'alpaca'\?\)"):
        make_template("alpca", usual="alpaca", tokenizer=tokenizer)


# ---------------------------------------------------------------- a file of one's own


def test_a_file_shows_instruction_and_input_and_its_last_line_break_counts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    name = file(tmp_path, "Q: {{ instruction }}{% if input %} ({{ input }}){% endif %}\nA:\n")
    own = make_template(name, usual="alpaca", tokenizer=tokenizer)
    assert own.render(request("Add.", "1 2")).question == "Q: Add. (1 2)\nA:\n"
    assert own.render(request("Add.")).question == "Q: Add.\nA:\n"


def test_a_file_that_shows_messages_is_a_chat_template(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    own = make_template(file(tmp_path, CHATML), usual="chat", tokenizer=tokenizer)
    assert own.render(talk()) == chat(tokenizer, CHATML).render(talk())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ instrction }}", r"'instrction' is unknown \(did you mean 'instruction'\?\)"),
        ("Answer me.", "shows no instruction"),
        ("{{ instruction }", "line 1: not a Jinja template"),
        ("{% include 'x' %}{{ instruction }}", "uses another file"),
        ("{{ instruction.__class__.__mro__ }}", "cannot show rows.jsonl:3: SecurityError"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_reason(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, text: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        make_template(file(tmp_path, text), usual="alpaca", tokenizer=tokenizer).render(request("Add."))


def test_a_file_in_another_encoding_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "own.jinja"
    path.write_bytes("{{ instruction }} é".encode("latin-1"))
    with pytest.raises(DataError, match="byte 18 is not UTF-8"):
        make_template(str(path), usual="alpaca", tokenizer=tokenizer)


# ---------------------------------------------------------------- conversations


def test_loss_is_taken_on_every_turn_of_the_assistant_and_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    one = encode(talk(), chat(tokenizer, CHATML), tokenizer)
    assert labelled(one, tokenizer) == ["Well, thanks.<|end|>", "As before.<|end|></s>"]


def test_ids_and_mask_are_those_of_transformers_where_the_template_has_generation_tags(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    one = encode(talk(), chat(tokenizer, CHATML), tokenizer)
    messages = [{"role": turn.role, "content": turn.text} for turn in TALK]
    whole = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": "As before."}],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    newline = tokenizer("\n")["input_ids"]  # after the last end, where the model has stopped already
    assert [*one.ids[:-1], *newline] == whole["input_ids"]
    labels = collate([[one]], pad_id=0).labels[0, 0]
    assert [int(label != NO_LOSS) for label in labels[:-1]] + [0] == whole["assistant_masks"]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(one.question) == asked == list(one.ids[: one.prompt_length])


def test_text_between_the_question_and_the_answer_is_trained_on(tokenizer: PreTrainedTokenizerFast) -> None:
    one = encode(talk(), chat(tokenizer, THINKS), tokenizer)
    assert labelled(one, tokenizer)[-1] == "<think>\n\n</think>\n\nAs before.<|end|></s>"
    assert tokenizer.decode(one.question).endswith("And now?<|end|>\n<|start|>assistant\n")


def test_an_end_of_text_of_the_template_is_not_doubled(tokenizer: PreTrainedTokenizerFast) -> None:
    one = encode(talk(), chat(tokenizer, INST), tokenizer)
    assert tokenizer.decode(one.ids) == (
        "<s>[INST] How do you do? [/INST] Well, thanks. </s><s>[INST] And now? [/INST] As before. </s>"
    )
    assert labelled(one, tokenizer) == [" Well, thanks. </s>", " As before. </s>"]


def test_a_request_is_one_turn_of_the_user(tokenizer: PreTrainedTokenizerFast) -> None:
    rendered = chat(tokenizer, CHATML).render(request("Add.", "1 2"))
    assert rendered.question == "<|start|>user\nAdd.\n\n1 2<|end|>\n<|start|>assistant\n"
    assert rendered.answer == "yes<|end|>"


def test_a_cut_conversation_keeps_its_first_token_and_its_last_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    template = chat(tokenizer, INST)
    whole = encode(talk(), template, tokenizer)
    for room in range(6, len(whole.ids)):
        one = encode(talk(), template, tokenizer, max_length=room)
        assert len(one.ids) == room
        assert one.ids[0] == tokenizer.bos_token_id
        assert one.ids[-1] == tokenizer.eos_token_id
        gone = len(whole.ids) - room
        back = {place for start, stop in one.labelled for place in range(start, stop)}
        kept = {place - gone for start, stop in whole.labelled for place in range(start, stop)}
        assert back == {place for place in kept if place >= 1}


def test_a_date_in_a_template_is_always_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    dated = "{{ strftime_now('%d %b %Y') }}" + CHATML
    assert chat(tokenizer, dated).render(talk()).question.startswith("26 Jul 2024<|start|>")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (CHATML.replace("message['content'] + '<|end|>' }}{% end", "'...' }}{% end"), "leaves out or repeats"),
        (CHATML.replace("message['content'] + '<|end|>' }}{% end", "message['content'] * 2 }}{% end"), "leaves out"),
        (CHATML.replace("message['content'] + '<|end|>' }}{% end", "message['content'] | upper }}{% end"), "changes"),
    ],
)
def test_a_template_that_hides_what_the_assistant_says_is_refused(
    tokenizer: PreTrainedTokenizerFast, source: str, message: str
) -> None:
    with pytest.raises(DataError, match=f"{message}.*talks.jsonl:7"):
        chat(tokenizer, source).render(talk())


def test_a_template_that_refuses_a_conversation_is_quoted_in_its_own_words_only(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(DataError, match=r"talks.jsonl:7: Roles must alternate user and assistant$"):
        chat(tokenizer, INST).render(talk(Turn("system", "be brief"), Turn("user", "x")))
    shouts = "{{ raise_exception('no ' + messages[0].content) }}{{ messages }}"
    with pytest.raises(DataError, match=r"talks.jsonl:7: TemplateError$"):
        chat(tokenizer, shouts).render(talk())


def test_no_chat_template_is_an_error_and_never_a_default(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="'auto': the tokenizer of this base has no chat template; these data are conv"):
        make_template("auto", usual="chat", tokenizer=tokenizer)


def test_turns_that_are_only_shown_are_not_trained_on(tokenizer: PreTrainedTokenizerFast) -> None:
    given = (
        Turn("user", "How do you do?"),
        Turn("assistant", "Well, thanks.", trained=False),
        Turn("user", "And now?"),
    )
    one = encode(talk(*given), chat(tokenizer, CHATML), tokenizer)
    assert labelled(one, tokenizer) == ["As before.<|end|></s>"]


def test_a_generation_prompt_that_is_not_a_prefix_of_the_example_is_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    odd = CHATML.replace("{{ '<|start|>assistant\n' }}", "{{ '<|start|>model\n' }}")
    client = Client("c", "c", None, {}, (talk(), talk()), (talk(),), ())
    for source, count in ((odd, 3), (CHATML, 0), (THINKS, 0)):
        data = encode_client(client, tokenizer, template=chat(tokenizer, source), max_length=400)
        assert data.asked_otherwise == count
    data = encode_client(client, tokenizer, template=chat(tokenizer, odd), max_length=400)
    assert tokenizer.decode(data.validation[0].question).endswith("<|start|>model\n")


@pytest.mark.parametrize("template", [ALPACA, NONE])
def test_a_conversation_does_not_fit_a_template_of_single_requests(template: Template) -> None:
    with pytest.raises(DataError, match=r"talks.jsonl:7 is a conversation; use data.template: chat"):
        template.render(talk())


# ---------------------------------------------------------------- the plain templates by name

SHOWN = {
    "plain": "System:\nbe brief\n\nUser:\nHow do you do?\n\nAssistant:\nWell, thanks.</s>\n\nUser:\nAnd now?\n\n"
    "Assistant:\nAs before.</s>",
    "chatml": "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nHow do you do?<|im_end|>\n"
    "<|im_start|>assistant\nWell, thanks.<|im_end|></s>\n<|im_start|>user\nAnd now?<|im_end|>\n"
    "<|im_start|>assistant\nAs before.<|im_end|></s>",
    "zephyr": "<|system|>\nbe brief</s>\n<|user|>\nHow do you do?</s>\n<|assistant|>\nWell, thanks.</s>\n"
    "<|user|>\nAnd now?</s>\n<|assistant|>\nAs before.</s>",
}


@pytest.mark.parametrize("name", sorted(CHATS))
def test_a_template_by_name_shows_every_turn_and_asks_as_it_trains(
    name: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    template = make_template(name, usual="chat", tokenizer=tokenizer)
    one = encode(talk(Turn("system", "be brief"), *TALK), template, tokenizer)
    assert tokenizer.decode(one.ids) == SHOWN[name]
    end = "<|im_end|></s>" if name == "chatml" else "</s>"
    assert labelled(one, tokenizer) == [f"Well, thanks.{end}", f"As before.{end}"]
    assert list(one.ids[: len(one.question)]) == list(one.question)


@pytest.mark.parametrize("name", sorted(CHATS))
def test_a_request_under_a_template_by_name_is_one_turn_of_the_user(
    name: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    template = make_template(name, usual="none", tokenizer=tokenizer)
    shown = template.render(request("add", "1 and 2"))
    assert "add\n\n1 and 2" in shown.question
    assert shown.answer.startswith("yes")
    assert shown.begins


def test_a_template_by_name_begins_with_bos_where_the_tokenizer_does(tokenizer: PreTrainedTokenizerFast) -> None:
    with_bos = deepcopy(tokenizer)
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", with_bos.bos_token_id)]
    )
    for name in CHATS:
        one = encode(talk(), make_template(name, usual="chat", tokenizer=with_bos), with_bos)
        assert list(one.ids).count(with_bos.bos_token_id) == 1
        assert one.ids[0] == with_bos.bos_token_id


def test_chatml_ends_a_turn_once_where_its_end_is_the_end_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    own = deepcopy(tokenizer)
    own.add_special_tokens({"eos_token": "<|im_end|>"})
    template = make_template("chatml", usual="chat", tokenizer=own)
    assert template.render(talk()).answer == "As before.<|im_end|>"


def test_a_missing_chat_template_names_the_plain_ones(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"data\.template: plain, chatml, zephyr"):
        make_template("auto", usual="chat", tokenizer=tokenizer)
