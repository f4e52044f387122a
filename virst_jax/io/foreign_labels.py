"""The objects on a frame as other packages' types. The packages are extras, loaded when they are asked for.

Axes: N objects, H, W size.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from virst_jax.io.exports import box_of


def supervision_detections(
    masks: np.ndarray, labels: Sequence[str], object_ids: Sequence[int], scores: Sequence[float]
) -> Any:
    """`supervision.Detections` of the objects that are seen.

    Args:
      masks: bool[N, H, W].
      labels: become class_name, and class_id in the order of their first appearance.
      object_ids: become tracker_id.
      scores: logits, which become confidences.
    """
    import supervision

    seen = [i for i, mask in enumerate(masks) if mask.any()]
    kinds = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    corners = [(x, y, x + width, y + height) for x, y, width, height in (box_of(masks[i]) for i in seen)]
    return supervision.Detections(
        xyxy=np.array(corners, np.float32).reshape(-1, 4),
        mask=np.asarray(masks)[seen],
        confidence=np.array([probability(scores[i]) for i in seen], np.float32),
        class_id=np.array([kinds[labels[i]] for i in seen], int),
        tracker_id=np.array([object_ids[i] for i in seen], int),
        data={"class_name": np.array([labels[i] for i in seen], dtype=str)},
    )


def fiftyone_detections(
    masks: np.ndarray, labels: Sequence[str], object_ids: Sequence[int], scores: Sequence[float]
) -> Any:
    """`fiftyone.Detections` of the objects that are seen: boxes as shares of the frame, and masks within them.

    Args: as of `supervision_detections`; object_ids become `index`.
    """
    import fiftyone

    height, width = masks.shape[1:]
    found = []
    for mask, text, object_id, score in zip(masks, labels, object_ids, scores):
        if not mask.any():
            continue
        left, top, w, h = box_of(mask)
        found.append(
            fiftyone.Detection(
                label=text,
                bounding_box=[left / width, top / height, w / width, h / height],
                mask=mask[top : top + h, left : left + w],
                index=int(object_id),
                confidence=probability(score),
            )
        )
    return fiftyone.Detections(detections=found)


def probability(logit: float) -> float:
    """Of a score; nan stays nan."""
    return float(1 / (1 + np.exp(-np.clip(np.float64(logit), -80, 80))))
