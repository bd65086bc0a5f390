"""Pages for people, beside the API: what they show is what the API and the commands say."""

from app.web import analytics, assets, chat, sessions, stores

PAGES = (assets.router, chat.router, analytics.router, sessions.router, stores.router)
