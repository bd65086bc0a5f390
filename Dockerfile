# The service alone: PostgreSQL and Redis run elsewhere. Build with `docker build -t chat-sessions .`

FROM python:3.13-slim AS build
WORKDIR /srv/chat-sessions
COPY requirements/app.txt requirements/
RUN python3 -m venv /venv \
    && /venv/bin/pip install --no-cache-dir --require-hashes -r requirements/app.txt
# The package with what it reads beside itself: migrations, and the documentation that the default
# assistant answers from. Editable, so that both are found where they stand.
COPY pyproject.toml README.md LICENSE alembic.ini ./
COPY migrations migrations
COPY docs docs
COPY app app
RUN /venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation --editable .

FROM python:3.13-slim
COPY --from=build /venv /venv
COPY --from=build /srv/chat-sessions /srv/chat-sessions
WORKDIR /srv/chat-sessions
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOST=0.0.0.0 PORT=8000
# A number, so that an orchestrator can see that it is not root.
USER 10001:10001
EXPOSE 8000
# Asks no store: a container is not restarted because its database is.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s CMD \
    ["python3", "-c", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ['PORT']}/health/live\", timeout=2)"]
# The schema first: a service on the wrong one refuses to start.
CMD ["sh", "-c", "chat-sessions migrate && exec chat-sessions serve"]
