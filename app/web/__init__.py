"""Pages for people, beside the API: what they show is what the API and the commands say."""

from app.web import assets, stores

PAGES = (assets.router, stores.router)
