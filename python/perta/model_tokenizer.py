"""A model's own tokenizer and chat template, as transformers uses them, without transformers."""

import datetime
import json
from pathlib import Path
from typing import Any

from perta.command import Problem, need

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise Problem(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise Problem(f"{path}: not a JSON object")
    return value


def template_in(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template: chat_template.jinja comes before tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise Problem(f"{path}: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {one["name"]: one["template"] for one in template}
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None and not isinstance(template, str):
        raise TypeError("chat_template is not a string")
    return template


class ModelTokenizer:
    """Turns text into token ids. `size` is one more than the largest id that it can give."""

    def __init__(
        self,
        backend,
        special: dict[str, str] | None = None,
        template: str | None = None,
        date: datetime.datetime | None = None,
    ) -> None:
        self.backend, self.special, self.template = backend, special or {}, template
        self.date = date or datetime.datetime.now()
        self.backend.no_truncation()
        self.backend.no_padding()
        self.eos_id = self.id_of("eos_token")
        self.bos_id = self.id_of("bos_token")
        self.compiled = None

    @property
    def size(self) -> int:
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @classmethod
    def open(cls, folder: Path, date: datetime.datetime | None = None) -> "ModelTokenizer":
        """The tokenizer in a model's folder: tokenizer.json, with what tokenizer_config.json and
        special_tokens_map.json change."""
        need("tokenizers")
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not folder.is_dir():
            raise Problem(f"{folder}: no such folder")
        if not path.is_file():
            raise Problem(f"{path}: no such file: the model has no tokenizer, or one in another "
                          "format; transformers' save_pretrained writes this one")  # fmt: skip
        try:
            backend = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise Problem(f"{path}: {error}") from None
        config = read_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # as older versions of transformers wrote it
            config |= read_json(folder / "special_tokens_map.json")
        try:
            special = add_special_tokens(backend, config)
            end_texts(backend, config, special)
            template = template_in(folder, config)
        except Problem:
            raise
        except Exception as error:  # a key of it has another type; the library raises bare Exception
            raise Problem(f"{folder}/tokenizer_config.json: {type(error).__name__}: {error}") from None
        return cls(backend, special, template, date)

    def id_of(self, name: str) -> int | None:
        token = self.special.get(name)
        return None if token is None else self.backend.token_to_id(token)

    def encode(self, text: str, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and the characters (first, end) that each stands for. With special, with the
        tokens that the tokenizer puts before and after a text."""
        try:
            encoding = self.backend.encode(text, add_special_tokens=special)
        except Exception as error:  # the library raises bare Exception
            raise Problem(f"the tokenizer: {error}") from None
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int]) -> str:
        """Text, without special tokens."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def render(self, messages: list[dict[str, str]], generation_prompt: bool) -> str:
        """A conversation as text by the model's chat template."""
        need("jinja2")
        try:
            self.compiled = self.compiled or compile_template(self.template or "", self.date)
            return self.compiled.render(messages=messages, add_generation_prompt=generation_prompt,
                                        tools=None, documents=None, **self.special)  # fmt: skip
        except Exception as error:  # a template can raise anything
            raise Problem(f"the chat template: {error}") from None


def add_special_tokens(backend, config: dict[str, Any]) -> dict[str, str]:
    """Add the tokens of tokenizer_config.json that tokenizer.json lacks, in transformers' order.
    Returns the named ones."""
    from tokenizers import AddedToken

    def added(value: Any, special: bool) -> AddedToken:
        if isinstance(value, str):
            return AddedToken(value, special=special)
        flags = {key: value[key] for key in ("single_word", "lstrip", "rstrip", "normalized") if key in value}
        return AddedToken(value["content"], special=value.get("special", special), **flags)

    def content(value: Any) -> str:
        return value if isinstance(value, str) else value["content"]

    def is_token(value: Any) -> bool:
        return isinstance(value, str) or (isinstance(value, dict) and "content" in value)

    decoder = config.get("added_tokens_decoder") or {}
    known = backend.get_added_tokens_decoder().values()
    reprs = {repr(token) for token in known}
    tokens = [added(value, False) for _, value in sorted(decoder.items(), key=lambda item: int(item[0]))]
    tokens = [token for token in tokens if repr(token) not in reprs]
    has = {token.content for token in [*known, *tokens]}
    named = {key: config[key] for key in config if key.endswith("_token") and is_token(config[key])}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        named, extra = named | extra, []
    named = {key: named[key] for key in NAMED if key in named} | named
    for value in [*named.values(), *extra]:
        if content(value) not in has:
            has.add(content(value))
            tokens.append(added(value, True))
    backend.add_tokens(tokens)
    return {key: content(value) for key, value in named.items()}


def end_texts(backend, config: dict[str, Any], special: dict[str, str]) -> None:
    """add_bos_token and add_eos_token say what texts begin and end with, where they are given."""
    from tokenizers import processors

    if not {"add_bos_token", "add_eos_token"} & config.keys():
        return
    bos, eos = (special.get(name) if config.get(f"add_{name}") else None for name in ("bos_token", "eos_token"))
    single = " ".join(f"{token}:0" for token in (bos, "$A", eos) if token)
    pair = f"{single} " + " ".join(f"{token}:1" for token in (bos, "$B", eos) if token)
    tokens = [(token, backend.token_to_id(token)) for token in (bos, eos) if token]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=tokens)


def compile_template(text: str, date: datetime.datetime):
    """With the settings of transformers: blocks leave no lines behind, templates run in a sandbox,
    and have tojson, raise_exception and strftime_now."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what a model says; it prints what it contains."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            call = self.call_method("_content")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _content(self, caller):
            return caller()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)  # fmt: skip

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = date.strftime
    return environment.from_string(text)
