r"""How each family of models spells tool calls. Names are those of vLLM's --tool-call-parser.

A call is read by three regular expressions around its arguments: `head` from a trigger to the arguments, `more` from
the arguments of one call to those of the next in the same list, `tail` from the last arguments to the end. None of
them may end in something optional or of variable length, or what is found would depend on how a stream was cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from langchain_vllm_server.tool_parsers.arguments import GemmaArguments, JsonArguments, PythonArguments, XmlArguments

if TYPE_CHECKING:
    from langchain_vllm_server.tool_parsers.arguments import Arguments

# {"name": "f", "arguments":     — and what follows the arguments
_OBJECT = r'\{\s*"name"\s*:\s*"(?P<name>[^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:'
_PYTHON = r"(?P<name>[A-Za-z_][\w.-]*)(?=\()"
_JSON = JsonArguments()


@dataclass(frozen=True, slots=True)
class Written:
    """How calls with JSON arguments are written, for grammars that allow nothing else; NAME is the JSON string."""

    open: str
    begin: str
    end: str
    between: str
    close: str


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One family.

    Attributes:
        names: vLLM's names of it, the first one ours.
        marks: Texts, one of which a chat template of this family has.
        triggers: Where a call may begin in an answer.
        head: From a trigger to the arguments.
        arguments: Their spelling.
        more: From arguments to those of the next call.
        tail: From arguments to the end of the call.
        closers: What may follow a call without a meaning of its own.
        written: How a grammar spells calls; None where arguments are not JSON.
        leading: Whether calls can only come first in an answer: a trigger later on is text.
    """

    names: tuple[str, ...]
    marks: tuple[str, ...]
    triggers: tuple[str, ...]
    head: str
    arguments: Arguments = _JSON
    more: str | None = None
    tail: str | None = None
    closers: tuple[str, ...] = ()
    written: Written | None = None
    leading: bool = False


HERMES = ToolFormat(
    names=("hermes", "qwen3_json", "qwen2_5", "granite4", "minicpm5", "longcat"),
    marks=("<tool_call>",),
    triggers=("<tool_call>",),
    head=rf"<tool_call>\s*{_OBJECT}",
    more=rf"\s*\}}\s*{_OBJECT}",
    tail=r"\s*\}\s*</tool_call>",
    written=Written("", '<tool_call>\n{"name": NAME, "arguments": ', "}\n</tool_call>", "\n", ""),
)
QWEN3_CODER = ToolFormat(
    names=("qwen3_coder", "qwen3_xml", "seed_oss", "step3p5"),
    marks=("<function=", "<parameter="),
    triggers=("<tool_call>", "<function="),
    head=r"(?:<tool_call>\s*)?<function=(?P<name>[^>\s]+)>",
    arguments=XmlArguments(),
    tail=r"\s*</tool_call>",
)
LLAMA3_JSON = ToolFormat(
    names=("llama3_json", "llama4_json", "llama"),
    marks=('"parameters": dictionary', "<|python_tag|>"),
    triggers=("<|python_tag|>", "{"),
    head=rf"(?:<\|python_tag\|>)?\s*{_OBJECT}",
    more=rf"\s*\}}\s*[;,]?\s*{_OBJECT}",
    tail=r"\s*\}",
    written=Written("", '{"name": NAME, "parameters": ', "}", "; ", ""),
    leading=True,
)
PYTHONIC = ToolFormat(
    names=("pythonic", "llama4_pythonic"),
    marks=("[func_name1(params_name1=",),
    triggers=("<|python_start|>", "["),
    head=rf"(?:<\|python_start\|>)?\[\s*{_PYTHON}",
    arguments=PythonArguments(),
    more=rf"\s*,\s*{_PYTHON}",
    tail=r"\s*\]",
    leading=True,
)
OLMO3 = ToolFormat(
    names=("olmo3",),
    marks=("<function_calls>",),
    triggers=("<function_calls>",),
    head=rf"<function_calls>\s*{_PYTHON}",
    arguments=PythonArguments(),
    more=rf"\s*{_PYTHON}",
    tail=r"\s*</function_calls>",
)
LFM2 = ToolFormat(
    names=("lfm2",),
    marks=("<|tool_call_start|>", "<|tool_list_start|>"),
    triggers=("<|tool_call_start|>",),
    head=rf"<\|tool_call_start\|>\s*\[\s*{_PYTHON}",
    arguments=PythonArguments(),
    more=rf"\s*,\s*{_PYTHON}",
    tail=r"\s*\]\s*<\|tool_call_end\|>",
)
MISTRAL = ToolFormat(
    names=("mistral",),
    marks=("[TOOL_CALLS]",),
    triggers=("[TOOL_CALLS]",),
    head=rf"\[TOOL_CALLS\]\s*(?:\[\s*{_OBJECT}|(?P<name>[\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\]|(?=\{{)))",
    more=rf'\s*(?:,\s*"id"\s*:\s*"[^"]*"\s*)?\}}\s*,\s*{_OBJECT}',
    tail=r'\s*(?:,\s*"id"\s*:\s*"[^"]*"\s*)?\}\s*\]',
    written=Written("[TOOL_CALLS][", '{"name": NAME, "arguments": ', "}", ", ", "]"),
)
GRANITE = ToolFormat(
    names=("granite", "granite-20b-fc"),
    marks=("<|tool_call|>",),
    triggers=("<|tool_call|>", "<tool_call>"),
    head=rf"(?:<\|tool_call\|>|<tool_call>)\s*\[?\s*{_OBJECT}",
    more=rf"\s*\}}\s*,\s*{_OBJECT}",
    tail=r"\s*\}",
    closers=("]",),
    written=Written("<|tool_call|>[", '{"name": NAME, "arguments": ', "}", ", ", "]"),
)
PHI4_MINI = ToolFormat(
    names=("phi4_mini_json",),
    marks=("<|tool|>", "functools"),
    triggers=("functools[", "<|tool_call|>"),
    head=rf"(?:functools\[|<\|tool_call\|>\s*\[?)\s*{_OBJECT}",
    more=rf"\s*\}}\s*,\s*{_OBJECT}",
    tail=r"\s*\}\s*\]",
    closers=("<|/tool_call|>",),
    written=Written("functools[", '{"name": NAME, "arguments": ', "}", ", ", "]"),
)
FUNCTIONGEMMA = ToolFormat(
    names=("functiongemma",),
    marks=("<start_function_call>",),
    triggers=("<start_function_call>",),
    head=r"<start_function_call>\s*call:(?P<name>[^\s{]+)(?=\{)",
    arguments=GemmaArguments("<escape>", "<end_function_call>"),
)
GEMMA4 = ToolFormat(
    names=("gemma4", "gemma"),
    marks=("<|tool_call>",),
    triggers=("<|tool_call>",),
    head=r"<\|tool_call>\s*call:(?P<name>[^\s{]+)(?=\{)",
    arguments=GemmaArguments('<|"|>', "<tool_call|>"),
)
_DEEPSEEK_CALL, _DEEPSEEK_SEP, _DEEPSEEK_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_DEEPSEEK_FIRST = rf"<｜tool▁calls▁begin｜>\s*{_DEEPSEEK_CALL}"
DEEPSEEK_V3 = ToolFormat(
    names=("deepseek_v3",),
    marks=("function' + '<｜tool▁sep｜>", "```json"),
    triggers=("<｜tool▁calls▁begin｜>",),
    head=rf"{_DEEPSEEK_FIRST}function{_DEEPSEEK_SEP}(?P<name>[^\n]+)\n```json\n",
    more=rf"\s*```\s*{_DEEPSEEK_END}\s*{_DEEPSEEK_CALL}function{_DEEPSEEK_SEP}(?P<name>[^\n]+)\n```json\n",
    tail=rf"\s*```\s*{_DEEPSEEK_END}",
    closers=("<｜tool▁calls▁end｜>",),
    written=Written(
        "<｜tool▁calls▁begin｜>",
        f"{_DEEPSEEK_CALL}function{_DEEPSEEK_SEP}BARE\n```json\n",
        f"\n```{_DEEPSEEK_END}",
        "\n",
        "<｜tool▁calls▁end｜>",
    ),
)
DEEPSEEK_V31 = ToolFormat(
    names=("deepseek_v31", "deepseek_v32", "deepseek_v4"),
    marks=("<｜tool▁calls▁begin｜>",),
    triggers=("<｜tool▁calls▁begin｜>",),
    head=rf"{_DEEPSEEK_FIRST}(?P<name>[^<\n]+){_DEEPSEEK_SEP}",
    more=rf"\s*{_DEEPSEEK_END}\s*{_DEEPSEEK_CALL}(?P<name>[^<\n]+){_DEEPSEEK_SEP}",
    tail=rf"\s*{_DEEPSEEK_END}",
    closers=("<｜tool▁calls▁end｜>",),
    written=Written(
        "<｜tool▁calls▁begin｜>", f"{_DEEPSEEK_CALL}BARE{_DEEPSEEK_SEP}", _DEEPSEEK_END, "", "<｜tool▁calls▁end｜>"
    ),
)
HARMONY = ToolFormat(
    names=("openai",),
    marks=("<|channel|>",),
    triggers=("<|channel|>commentary to=", "<|start|>assistant to="),
    head=r"(?:<\|channel\|>commentary to=|<\|start\|>assistant to=)functions\.(?P<name>[\w.-]+)"
    r"[^<]*(?:<\|channel\|>[^<]*)?(?:<\|constrain\|>[^<]*)?<\|message\|>",
    tail=r"<\|call\|>",
    written=Written(
        "", "<|channel|>commentary to=functions.BARE <|constrain|>json<|message|>", "<|call|>", "<|start|>assistant", ""
    ),
)
GENERIC = ToolFormat(
    names=("generic",),  # of no model: for those without tool training, told by a prompt of ours
    marks=(),
    triggers=("{",),
    head=_OBJECT,
    more=rf"\s*\}}\s*[,;]?\s*{_OBJECT}",
    tail=r"\s*\}",
    written=Written("", '{"name": NAME, "arguments": ', "}", "\n", ""),
    leading=True,
)

# In the order in which a template is asked: one that has the marks of several belongs to the first of them.
FORMATS = (
    QWEN3_CODER, FUNCTIONGEMMA, GEMMA4, LFM2, OLMO3, DEEPSEEK_V3, DEEPSEEK_V31, GRANITE, PHI4_MINI, MISTRAL,
    HERMES, HARMONY, PYTHONIC, LLAMA3_JSON, GENERIC,
)  # fmt: skip
BY_NAME = {name: each for each in FORMATS for name in each.names}


def of_template(source: str | None) -> ToolFormat:
    """The format that a chat template teaches; GENERIC for one without tools."""
    if source is None or "tools" not in source:
        return GENERIC
    return next((each for each in FORMATS if any(mark in source for mark in each.marks)), GENERIC)
