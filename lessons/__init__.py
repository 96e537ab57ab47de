"""The course: one folder a lesson. Start with README.md."""
