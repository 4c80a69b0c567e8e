"""`python -m langchain_vllm.demo`: the example of LangChain's vLLM page, with no server running beforehand."""

from __future__ import annotations

import time

from langchain_core.prompts import ChatPromptTemplate

from langchain_vllm import ChatVLLM


def main() -> None:
    """Translate a sentence, and print what it took."""
    prompt = ChatPromptTemplate.from_messages(
        [
            ("system", "You are a helpful assistant that translates {input_language} to {output_language}."),
            ("human", "Translate the following sentence from {input_language} to {output_language}: {text}"),
        ]
    )
    llm = ChatVLLM(model="SmolLM2-135M-Instruct", temperature=0, max_tokens=64, server_options={"show_progress": True})
    values = {"input_language": "English", "output_language": "Italian", "text": "I love programming."}

    begin = time.perf_counter()
    times, tokens = [], 0
    for chunk in (prompt | llm).stream(values):
        print(chunk.text, end="", flush=True)  # noqa: T201
        if chunk.text:
            times.append(time.perf_counter())
        tokens += chunk.usage_metadata["output_tokens"] if chunk.usage_metadata else 0

    cold_start = (llm.server and llm.server.startup_seconds) or 0.0
    first_token = times[0] - begin - cold_start
    speed = (tokens - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
    print(  # noqa: T201
        f"\n\ncold start {cold_start:.2f} s · time to first token {first_token * 1000:.0f} ms · {speed:.0f} tokens/s"
    )


if __name__ == "__main__":
    main()
