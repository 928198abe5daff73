"""Settings that every test shares."""

from hypothesis import HealthCheck, settings

# The first call of a kernel compiles it: hundreds of milliseconds, against hypothesis's deadline of 200.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")
