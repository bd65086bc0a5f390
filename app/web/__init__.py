"""Pages for people, beside the API: what they show is what the API and the commands say."""

from app.web import analytics, assets, stores

PAGES = (assets.router, analytics.router, stores.router)
