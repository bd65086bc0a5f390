"""`python -m app` is `chat-sessions`."""

from app.cli.main import main

main()
