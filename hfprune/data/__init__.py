"""Models, texts and tasks from the hub, a wheel or a path; token sequences; contamination of the tests."""
