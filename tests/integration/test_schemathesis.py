"""What the service says of itself, held against what it does: schemathesis over its own OpenAPI description.

Left out: `use_after_free` and `ensure_resource_availability` (they follow links, the description has none;
`test_api.py` deletes and asks again), `ignored_auth` and `object_level_authorization` (nobody logs in here).
"""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from schemathesis.checks import CHECKS, load_all_checks

from app.application import create_app
from app.settings import Settings
from tests.integration.api_client import SESSIONS, empty_stores, serving

load_all_checks()
OF_THE_ANSWER = CHECKS.get_by_names(
    [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
    ]
)
OF_THE_REQUEST = CHECKS.get_by_names(
    ["negative_data_rejection", "missing_required_header", "unsupported_method", "allow_header_conformance"]
)
ACCEPTANCE = CHECKS.get_by_names(["positive_data_acceptance"])

#: Where what is described may be refused: a timestamp lies between the year 2000 and tomorrow, which no
#: schema can say, and schemathesis sends an empty If-Match where the pattern wants quotes. A search needs a
#: letter, and a range that is the right way round; a report is one that there is, and a time zone, too.
MAY_BE_REFUSED = {
    "GET /api/analytics/search": ACCEPTANCE,
    "GET /api/analytics/{report}": ACCEPTANCE,
    "POST /api/chat/sessions/{session_id}/history": ACCEPTANCE,
    "POST /api/chat/sessions/{session_id}/messages": ACCEPTANCE,
}


def described(*, allow_nul):
    """The description; a NUL is a character of any `string`, and refused in each of them."""
    generation = schemathesis.config.GenerationConfig(allow_x00=allow_nul, deterministic=True)
    project = schemathesis.config.ProjectConfig(generation=generation)
    return schemathesis.openapi.from_dict(
        create_app(Settings(_env_file=None)).openapi(),
        config=schemathesis.config.SchemathesisConfig(
            projects=schemathesis.config.ProjectsConfig(default=project)
        ),
    )


# The same examples in every run: what was found here is a test of its own elsewhere.
bounded = hypothesis_settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
async def settings(servers, database_url):
    return await empty_stores(servers, database_url)


@pytest.fixture(scope="module")
def url(settings):
    with serving(settings) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(base_url=url, trust_env=False) as client:
        yield client


@described(allow_nul=False).parametrize()
@bounded
def test_whatever_is_sent_is_answered_as_described(case, url):
    case.call_and_validate(
        base_url=url,
        checks=[*OF_THE_ANSWER, *OF_THE_REQUEST, *ACCEPTANCE],
        excluded_checks=MAY_BE_REFUSED.get(case.operation.label, []),
    )


@described(allow_nul=True).include(path_regex="session_id").parametrize()
@bounded
def test_whatever_is_sent_to_a_session_that_exists_is_answered_as_described(case, url, client):
    created = client.post(SESSIONS, params={"user_id": "user123"})
    case.path_parameters["session_id"] = created.json()["session_id"]
    case.call_and_validate(base_url=url, checks=OF_THE_ANSWER)
