"""Pages for people, beside the API: what they show is what the API and the commands say."""

from app.web import analytics, assets, chat, sessions, stores

PAGES = [
    *assets.routes,
    *(route for module in (chat, analytics, sessions, stores) for route in module.pages.routes),
]
