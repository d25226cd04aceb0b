from tests.conftest import demo_data, train  # noqa: F401 (fixtures)
