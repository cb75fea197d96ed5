// COCO's greedy matching of detections to targets. B lists of D detections, in order of score, and of G targets; T thresholds.
#pragma once

#include "common/views.h"

namespace sprompt {

// match (B, T, D) i64, contiguous <- iou (B, D, G) f64, thresholds (T) f64, ignored and crowd (B, G) b8 or none (all false),
// any strides. At a threshold t each detection in turn takes the free target of largest IoU >= min(t, 1 - 1e-10), the last of
// equal ones; if there is none, the same among the ignored targets. A crowd is ignored, and free for every detection. -1 if it
// takes none. A NaN among the IoUs or thresholds compares as false.
SPROMPT_KERNEL(match_detections, const View& iou, const View& thresholds, const View& ignored, const View& crowd,
               const View& match, int threads)

}  // namespace sprompt
