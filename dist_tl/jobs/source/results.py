"""Results of a source job: its two models and the accuracy of the classifier."""

from dist_tl.jobs.source.plan import SourceFacts
from dist_tl.report.results import Study, Table


def results(source: SourceFacts) -> Study:
    """Locations and fingerprints of the two models, and the accuracy of the classifier."""
    accuracy = f"{source.classifier_accuracy:.1%}"
    table = Table(
        title="Models",
        header=("model", "location in the run", "fingerprint"),
        rows=(
            ("source classifier", source.classifier, source.classifier_fingerprint),
            ("conditional generator", source.generator.path, source.generator_fingerprint),
        ),
        note="A transfer job names both under `source`, by URL.",
    )
    return Study(
        verdict=f"The source classifier has {accuracy} accuracy on held-out source images.",
        findings=(f"{source.num_held_out} source images were held out from both trainings.",),
        tables=(table,),
        facts=(
            ("Classes", f"{source.num_classes}"),
            ("Images (channels, height, width)", f"{tuple(source.image_shape)}"),
        ),
    )
