"""The OpenAI-compatible HTTP server: `jpaged serve`.

app.py puts it together; config.py has its settings; lifecycle.py runs it from the first line to the exit status.
A request's way: middleware.py -> protocol.py -> completions.py or chat.py -> generation.py -> AsyncLLM.
"""
