// COCO's box figures from arrays, counted as pycocotools' COCOeval counts them (cocoeval.py, maskApi.c: bbIou), in the same
// float64 arithmetic: the results are the same bits. No line here may be compiled for FMA, so there are no CLONES.
//
// Detections are matched image by image, in parallel; then each category is accumulated, in parallel. A detection's fate under
// the 4 area ranges and 10 IoU thresholds is 40 bits: bit a * 10 + t of `hits` says that it is a true positive there, of `misses`
// that it is a false one; neither is set where pycocotools ignores it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.hpp"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

constexpr int AREAS = 4, THRESHOLDS = 10, BITS = AREAS * THRESHOLDS, BEST = 100;
constexpr double AREA[AREAS][2] = {{0, 1e10}, {0, 1024}, {1024, 9216}, {9216, 1e10}};  // all, small, medium, large; inclusive
constexpr uint64_t EVERY_THRESHOLD = (1u << THRESHOLDS) - 1;
enum { ALL_1, ALL_10, ALL_100, SMALL, MEDIUM, LARGE, RECALLS };  // rows of the recalls
constexpr long IMAGES_A_TASK = 32;

struct Truth {  // as in data_sets.index.AnnotationIndex
    const int64_t* first;
    const double* boxes;  // x, y, width, height in pixels
    const int64_t* labels;
    const bool* crowd;
    const double* areas;
    long images, categories;
};

struct Part {  // what one update() brought
    Array<int64_t> images_, first_, labels_;
    Array<double> sizes_, boxes_, scores_;
    const int64_t *images, *first, *labels;
    const double *sizes, *boxes, *scores;  // boxes: ltrb in [0, 1]
    long count;
};

struct Place {  // where an image's detections are
    const Part* part = nullptr;
    long row = 0;
};

struct Record {  // one detection among the best 100 of its image and category
    uint64_t key, hits, misses;
    int32_t category, rank;
};

struct Keyed {
    uint64_t key;
    int64_t index;
    bool operator<(const Keyed& other) const { return key != other.key ? key < other.key : index < other.index; }
};

struct Item {
    int64_t label;
    uint64_t key;
    long index;
    bool operator<(const Item& other) const {
        if (label != other.label) return label < other.label;
        return key != other.key ? key < other.key : index < other.index;
    }
};

struct Candidate {
    int truth;
    double iou;
};

struct Real {  // a ground-truth box of the image and category at hand
    const double* box;
    double area;
    uint64_t taken;    // by an earlier detection, a bit for each area range and threshold
    uint32_t ignored;  // a bit for each area range
    bool crowd;
};

struct Scratch {
    std::vector<Item> found, real;
    std::vector<Real> reals;
    std::vector<Candidate> candidates;
};

// Ascending keys are falling scores; equal scores have equal keys, and NaN comes last, as in a NumPy sort of -score.
uint64_t falling(double score) {
    if (std::isnan(score)) return std::numeric_limits<uint64_t>::max();
    score += 0.0;  // -0 → 0
    uint64_t bits;
    std::memcpy(&bits, &score, sizeof bits);
    return bits >> 63 ? bits : ~bits & ~(uint64_t{1} << 63);
}

bool outside(double area, int range) { return area < AREA[range][0] || area > AREA[range][1]; }

// bbIou, except that an overlap which is not a number (a box that is not finite) is none.
double overlap(const double* found, const Real& real) {
    const double* truth = real.box;
    const double width = std::fmin(found[2] + found[0], truth[2] + truth[0]) - std::fmax(found[0], truth[0]);
    if (!(width > 0)) return 0;
    const double height = std::fmin(found[3] + found[1], truth[3] + truth[1]) - std::fmax(found[1], truth[1]);
    if (!(height > 0)) return 0;
    const double both = width * height, area = found[2] * found[3];
    const double iou = both / (real.crowd ? area : area + truth[2] * truth[3] - both);
    return iou >= 0 ? iou : 0;
}

// The best ground-truth box for one detection at one area range and threshold, or -1: among those that count, then among the
// ignored. (pycocotools walks both in one loop, those that count first, and stops between them once it has one.)
int best_match(const std::vector<Candidate>& candidates, const std::vector<Real>& reals, int area, uint64_t bit, double threshold) {
    for (uint32_t ignored = 0; ignored < 2; ++ignored) {
        int match = -1;
        double best = threshold;
        for (const Candidate& candidate : candidates) {
            const Real& real = reals[candidate.truth];
            if ((real.ignored >> area & 1) != ignored || candidate.iou < best) continue;
            if ((real.taken & bit) && !real.crowd) continue;
            best = candidate.iou;
            match = candidate.truth;
        }
        if (match >= 0) return match;
    }
    return -1;
}

// Writes the records of one image and returns how many: categories ascending, by falling score within.
long match_image(const Truth& truth, long image, Place place, const double* thresholds, Scratch& scratch, Record* records) {
    auto& [found, real, reals, candidates] = scratch;
    const Part& part = *place.part;
    const long first = part.first[place.row], count = part.first[place.row + 1] - first;
    const double height = part.sizes[2 * place.row], width = part.sizes[2 * place.row + 1];
    found.clear();
    for (long i = first; i < first + count; ++i) found.push_back({part.labels[i], falling(part.scores[i]), i});
    std::sort(found.begin(), found.end());
    real.clear();
    for (long i = truth.first[image]; i < truth.first[image + 1]; ++i) real.push_back({truth.labels[i], 0, i});
    std::sort(real.begin(), real.end());

    long written = 0;
    auto next_real = real.begin();
    for (auto item = found.begin(); item != found.end();) {
        const int64_t label = item->label;
        while (next_real != real.end() && next_real->label < label) ++next_real;
        reals.clear();
        for (; next_real != real.end() && next_real->label == label; ++next_real) {
            const long i = next_real->index;
            uint32_t ignored = 0;
            for (int a = 0; a < AREAS; ++a) ignored |= uint32_t{truth.crowd[i] || outside(truth.areas[i], a)} << a;
            reals.push_back({truth.boxes + 4 * i, truth.areas[i], 0, ignored, truth.crowd[i]});
        }
        for (int rank = 0; item != found.end() && item->label == label; ++item, ++rank) {
            if (rank >= BEST) continue;
            const double* corners = part.boxes + 4 * item->index;
            double box[4] = {corners[0] * width, corners[1] * height, corners[2] * width, corners[3] * height};
            box[2] -= box[0];
            box[3] -= box[1];
            uint64_t inside = 0;
            for (int a = 0; a < AREAS; ++a)
                if (!outside(box[2] * box[3], a)) inside |= EVERY_THRESHOLD << a * THRESHOLDS;
            candidates.clear();
            for (size_t j = 0; j < reals.size(); ++j)
                if (const double iou = overlap(box, reals[j]); iou >= thresholds[0]) candidates.push_back({static_cast<int>(j), iou});
            uint64_t hits = 0, matched = 0;
            for (int a = 0; a < AREAS && !candidates.empty(); ++a)
                for (int t = 0; t < THRESHOLDS; ++t) {
                    const uint64_t bit = uint64_t{1} << (a * THRESHOLDS + t);
                    const int match = best_match(candidates, reals, a, bit, thresholds[t]);
                    if (match < 0) continue;
                    reals[match].taken |= bit;
                    matched |= bit;
                    if (!(reals[match].ignored >> a & 1)) hits |= bit;
                }
            records[written++] = {item->key, hits, inside & ~matched, static_cast<int32_t>(label - 1), rank};
        }
    }
    return written;
}

// What accumulate() fills: precisions (area, threshold, recall threshold, category), recalls (row, threshold, category).
struct Curves {
    double *precisions, *recalls;
    const double* recall_thresholds;
    long points, categories;
};

void accumulate(std::vector<double> (&curve)[BITS], const Record* records, const Keyed* begin, const Keyed* end, const long* counted,
                long category, const Curves& out) {
    long whole[AREAS] = {}, single[BITS] = {}, at_1[THRESHOLDS] = {}, at_10[THRESHOLDS] = {};
    for (auto& values : curve) values.clear();
    for (const Keyed* keyed = begin; keyed != end; ++keyed) {
        const Record& record = records[keyed->index];
        for (int a = 0; a < AREAS; ++a) {
            const uint64_t misses = record.misses >> a * THRESHOLDS & EVERY_THRESHOLD;
            if (misses == EVERY_THRESHOLD) {
                ++whole[a];
            } else {
                for (uint64_t rest = misses; rest; rest &= rest - 1) ++single[a * THRESHOLDS + __builtin_ctzll(rest)];
            }
        }
        for (uint64_t rest = record.hits; rest; rest &= rest - 1) {
            const int bit = __builtin_ctzll(rest);
            const double right = static_cast<double>(curve[bit].size() + 1), wrong = static_cast<double>(whole[bit / THRESHOLDS] + single[bit]);
            curve[bit].push_back(right / (wrong + right + std::numeric_limits<double>::epsilon()));
            if (bit < THRESHOLDS) {
                at_1[bit] += record.rank < 1;
                at_10[bit] += record.rank < 10;
            }
        }
    }
    for (int a = 0; a < AREAS; ++a) {
        if (counted[a] == 0) continue;  // stays -1
        const double all = static_cast<double>(counted[a]);
        for (int t = 0; t < THRESHOLDS; ++t) {
            // Precision only rises at a true positive, so its envelope needs only those; the n-th one has recall n / all.
            auto& precisions = curve[a * THRESHOLDS + t];
            const long right = static_cast<long>(precisions.size());
            for (long i = right - 1; i > 0; --i) precisions[i - 1] = std::max(precisions[i - 1], precisions[i]);
            double* to = out.precisions + (a * THRESHOLDS + t) * out.points * out.categories + category;
            long n = 0;
            for (long r = 0; r < out.points; ++r) {
                while (n <= right && static_cast<double>(n) / all < out.recall_thresholds[r]) ++n;
                to[r * out.categories] = n <= right && right > 0 ? precisions[std::max(n, 1L) - 1] : 0;
            }
            auto recall = [&](int row, long hits) { out.recalls[(row * THRESHOLDS + t) * out.categories + category] = static_cast<double>(hits) / all; };
            recall(ALL_100 + a, right);
            if (a == 0) {
                recall(ALL_1, at_1[t]);
                recall(ALL_10, at_10[t]);
            }
        }
    }
}

void require(bool fine, const char* what) {
    if (!fine) throw std::invalid_argument(std::string("coco figures: ") + what);
}

// first[0..n] must be a rising partition of [0, total).
void require_partition(const int64_t* first, long n, long total, const char* what) {
    bool fine = first[0] == 0 && first[n] == total;
    for (long i = 0; i < n; ++i) fine = fine && first[i] <= first[i + 1];
    require(fine, what);
}

void require_labels(const int64_t* labels, long count, long categories, const char* what) {
    bool fine = true;
    for (long i = 0; i < count; ++i) fine &= labels[i] >= 1 && labels[i] <= categories;
    require(fine, what);
}

Part part_of(const py::tuple& arrays) {
    require(arrays.size() == 6, "a part is (images, sizes, first, boxes, labels, scores)");
    Part part;
    part.images_ = py::cast<Array<int64_t>>(arrays[0]);
    part.sizes_ = py::cast<Array<double>>(arrays[1]);
    part.first_ = py::cast<Array<int64_t>>(arrays[2]);
    part.boxes_ = py::cast<Array<double>>(arrays[3]);
    part.labels_ = py::cast<Array<int64_t>>(arrays[4]);
    part.scores_ = py::cast<Array<double>>(arrays[5]);
    part.count = static_cast<long>(part.images_.size());
    const auto detections = part.labels_.size();
    require(part.sizes_.size() == 2 * part.count && part.first_.size() == part.count + 1, "sizes (N, 2) and first (N+1) must fit the N images");
    require(part.boxes_.size() == 4 * detections && part.scores_.size() == detections, "boxes (D, 4) and scores (D) must fit the D labels");
    part.images = part.images_.data();
    part.sizes = part.sizes_.data();
    part.first = part.first_.data();
    part.boxes = part.boxes_.data();
    part.labels = part.labels_.data();
    part.scores = part.scores_.data();
    return part;
}

void compute(const Truth& truth, const std::vector<Part>& parts, const double* thresholds, int threads, const Curves& out) {
    // Where each image's detections are, and where its records go.
    std::vector<Place> places(truth.images);
    for (const Part& part : parts) {
        const long detections = part.first_.size() ? static_cast<long>(part.labels_.size()) : 0;
        require_partition(part.first, part.count, detections, "first must partition the detections");
        require_labels(part.labels, detections, truth.categories, "a label is not one of the categories");
        for (long row = 0; row < part.count; ++row) {
            const int64_t image = part.images[row];
            require(image >= 0 && image < truth.images, "an image is not in the ground truth");
            require(!places[image].part, "an image comes twice");
            places[image] = {&part, row};
        }
    }
    std::vector<long> offset(truth.images + 1), written(truth.images);
    for (long i = 0; i < truth.images; ++i)
        offset[i + 1] = offset[i] + (places[i].part ? places[i].part->first[places[i].row + 1] - places[i].part->first[places[i].row] : 0);

    const std::unique_ptr<Record[]> records(new Record[offset[truth.images]]);
    parallel_for((truth.images + IMAGES_A_TASK - 1) / IMAGES_A_TASK, threads, [&](long task) {
        Scratch scratch;
        for (long i = task * IMAGES_A_TASK; i < std::min(truth.images, (task + 1) * IMAGES_A_TASK); ++i)
            if (places[i].part) written[i] = match_image(truth, i, places[i], thresholds, scratch, records.get() + offset[i]);
    });

    // Records by category; within one by image and rank, which decides between equal scores.
    std::vector<long> start(truth.categories + 1), counted(truth.categories * AREAS);
    for (long i = 0; i < truth.images; ++i)
        for (long j = offset[i]; j < offset[i] + written[i]; ++j) ++start[records[j].category + 1];
    for (long k = 0; k < truth.categories; ++k) start[k + 1] += start[k];
    const std::unique_ptr<Keyed[]> keyed(new Keyed[start[truth.categories]]);
    std::vector<long> next(start.begin(), start.end() - 1);
    for (long i = 0; i < truth.images; ++i)
        for (long j = offset[i]; j < offset[i] + written[i]; ++j) keyed[next[records[j].category]++] = {records[j].key, j};
    for (long i = 0; i < truth.first[truth.images]; ++i)
        for (int a = 0; a < AREAS; ++a) counted[(truth.labels[i] - 1) * AREAS + a] += !truth.crowd[i] && !outside(truth.areas[i], a);

    std::fill_n(out.precisions, BITS * out.points * truth.categories, -1.0);
    std::fill_n(out.recalls, RECALLS * THRESHOLDS * truth.categories, -1.0);
    parallel_for(truth.categories, threads, [&](long k) {
        Keyed *begin = keyed.get() + start[k], *end = keyed.get() + start[k + 1];
        std::sort(begin, end);
        std::vector<double> curve[BITS];
        accumulate(curve, records.get(), begin, end, counted.data() + k * AREAS, k, out);
    });
}

py::tuple figures(const Array<int64_t>& first, const Array<double>& boxes, const Array<int64_t>& labels, const Array<bool>& crowd,
                  const Array<double>& areas, long categories, const py::list& detections, const Array<double>& iou_thresholds,
                  const Array<double>& recall_thresholds, int threads) {
    require(first.size() >= 1 && categories >= 0 && categories < 1l << 31, "the ground truth needs first (I+1) and a count of categories");
    require(boxes.size() == 4 * labels.size() && crowd.size() == labels.size() && areas.size() == labels.size(),
            "boxes (B, 4), crowd (B) and areas (B) must fit the B labels");
    require(iou_thresholds.size() == THRESHOLDS, "there must be 10 IoU thresholds");
    const Truth truth{first.data(), boxes.data(), labels.data(), crowd.data(), areas.data(), static_cast<long>(first.size()) - 1, categories};
    std::vector<Part> parts;
    for (const auto& arrays : detections) parts.push_back(part_of(py::cast<py::tuple>(arrays)));
    double thresholds[THRESHOLDS];
    for (int t = 0; t < THRESHOLDS; ++t) thresholds[t] = std::min(iou_thresholds.data()[t], 1 - 1e-10);
    const long points = static_cast<long>(recall_thresholds.size());
    Array<double> precisions({long{AREAS}, long{THRESHOLDS}, points, categories}), recalls({long{RECALLS}, long{THRESHOLDS}, categories});
    const Curves out{precisions.mutable_data(), recalls.mutable_data(), recall_thresholds.data(), points, categories};
    {
        py::gil_scoped_release release;
        require_partition(truth.first, truth.images, labels.size(), "first must partition the ground truth");
        require_labels(truth.labels, labels.size(), categories, "a ground-truth label is not one of the categories");
        compute(truth, parts, thresholds, threads, out);
    }
    return py::make_tuple(precisions, recalls);
}

}  // namespace

PYBIND11_MODULE(_coco, module) {
    module.doc() = "COCO's box precisions and recalls, in the arithmetic of pycocotools.";
    module.def("figures", &figures, py::arg("first"), py::arg("boxes"), py::arg("labels"), py::arg("crowd"), py::arg("areas"),
               py::arg("categories"), py::arg("detections"), py::arg("iou_thresholds"), py::arg("recall_thresholds"), py::arg("threads"),
               R"(Precisions (4 area ranges, 10 IoU thresholds, R recall thresholds, C) at 100 detections an image, and
recalls (6, 10, C): all areas at 1, 10 and 100 detections, then small, medium, large; -1 where there is no ground truth.

detections: list of (image positions int64 (N), sizes float64 (N, 2) height width, first int64 (N+1), ltrb boxes in [0, 1]
float64 (D, 4), labels int64 (D) 1..C, scores float64 (D)). The GIL is free while it runs; ValueError for arrays that do not fit.)");
}
