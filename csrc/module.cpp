// negfast._core: the parts of negfast that run outside Python. Every call releases the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <limits>
#include <memory>

#include "decoder.hpp"
#include "features.hpp"
#include "packer.hpp"
#include "requests.hpp"
#include "shard.hpp"
#include "source.hpp"
#include "trees.hpp"
#include "verdict.hpp"
#include "writer.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace negfast {
namespace {

template <class T>
using Column = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Table = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using Output = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <class T>
std::span<const T> view(const Column<T>& column) {
  return {column.data(), column.size()};
}

void same_length(size_t found, size_t expected, const char* name) {
  if (found != expected)
    throw ShardError(std::string(name) + ": found " + std::to_string(found) + " entries, expected " +
                     std::to_string(expected));
}

void write_histories(const std::string& path, Column<int64_t> offsets, Column<int32_t> item, Column<uint8_t> feedback,
                     Column<int64_t> time, Column<uint32_t> user_list, uint64_t users, uint64_t items,
                     uint32_t time_unit, unsigned threads) {
  same_length(feedback.size(), item.size(), "feedback");
  same_length(time.size(), item.size(), "time");
  if (offsets.size() == 0 || offsets.data()[0] != 0 ||
      offsets.data()[offsets.size() - 1] != static_cast<int64_t>(item.size()))
    throw ShardError("user offsets: expected them to go from 0 to " + std::to_string(item.size()));
  for (size_t i = 0; i + 1 < offsets.size(); ++i)
    if (offsets.data()[i] > offsets.data()[i + 1]) throw ShardError("user offsets: found a decrease, expected none");
  if (user_list.size() > 0) same_length(user_list.size(), offsets.size() - 1, "user list");
  nb::gil_scoped_release release;
  const MemorySource source({view(offsets), item.data(), feedback.data(), time.data()});
  write_shard(path, source, {users, items, time_unit, threads, view(user_list)});
}

size_t request_days_of(Column<int64_t> offsets, Column<int32_t> item, Column<uint8_t> feedback, Column<int64_t> time,
                       int64_t horizon, Output<int64_t> user, Output<int64_t> day, Output<uint8_t> ahead) {
  same_length(feedback.size(), item.size(), "feedback");
  same_length(time.size(), item.size(), "time");
  for (const size_t size : {user.size(), day.size(), ahead.size()}) same_length(size, item.size(), "room for requests");
  if (offsets.size() > 0) same_length(item.size(), offsets.data()[offsets.size() - 1], "events");
  nb::gil_scoped_release release;
  return request_days(view(offsets), item.data(), feedback.data(), time.data(), horizon, user.data(), day.data(),
                      ahead.data());
}

std::unique_ptr<Features> make_features(bool by_day, double prior_rate, double prior_value, bool has_values,
                                        const std::vector<std::pair<size_t, float>>& attributes) {
  FeatureSettings settings{by_day ? 86'400 : 1, prior_rate, prior_value, has_values, {}};
  for (const auto& [columns, missing] : attributes) settings.attributes.push_back({columns, missing});
  return std::make_unique<Features>(settings);
}

void add_values(Features& features, Column<int32_t> column, Column<float> content) {
  same_length(content.size(), column.size(), "content");
  features.add_values(view(column), view(content));
}

void add_items(Features& features, Column<uint64_t> key, Table<float> text, Table<int32_t> cell,
               Column<int64_t> value_start, Column<int32_t> value) {
  same_length(text.shape(0), key.size(), "text");
  same_length(text.shape(1), kText, "columns of text");
  same_length(cell.shape(0), key.size(), "cells");
  same_length(cell.shape(1), 2, "columns of cells");
  same_length(value_start.size(), key.size() * features.attributes() + 1, "value_start");
  features.add_items({view(key), text.data(), cell.data(), view(value_start), view(value)});
}

void replay_features(Features& features, Column<int32_t> user, Column<int32_t> item, Column<int64_t> time,
                     Column<uint8_t> feedback, Column<float> value, Column<int32_t> asked_user,
                     Column<int32_t> asked_item, Column<int64_t> moment,
                     nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> out) {
  same_length(item.size(), user.size(), "item");
  same_length(time.size(), user.size(), "time");
  same_length(feedback.size(), user.size(), "feedback");
  same_length(value.size(), features.has_values() ? user.size() : 0, "value");
  same_length(asked_item.size(), asked_user.size(), "asked item");
  same_length(moment.size(), asked_user.size(), "moment");
  same_length(out.shape(0), asked_user.size(), "out");
  same_length(out.shape(1), features.width(), "columns of out");
  nb::gil_scoped_release release;
  features.replay({view(user), view(item), view(time), view(feedback), view(value)},
                  {view(asked_user), view(asked_item), view(moment)}, out.data());
}

nb::ndarray<nb::numpy, float, nb::ndim<2>> answer_features(Features& features, int32_t user, Column<int32_t> items,
                                                           int64_t moment) {
  auto out = std::make_unique<float[]>(std::max<size_t>(items.size() * features.width(), 1));
  features.answer(user, view(items), moment, out.get());
  float* data = out.release();
  nb::capsule owner(data, [](void* held) noexcept { delete[] static_cast<float*>(held); });
  return {data, {items.size(), features.width()}, owner};
}

// The state by name: [rows] or [rows, width].
nb::dict feature_tables(Features& features) {
  nb::dict out;
  features.tables([&out](const FeatureTable& table) -> void* {
    const size_t bytes = table.type == 'f' || table.type == 'i' ? 4 : 8, shape[] = {table.rows, table.width};
    const bool is_integer = table.type == 'i' || table.type == 'q';
    const auto code = static_cast<uint8_t>(is_integer ? nb::dlpack::dtype_code::Int : nb::dlpack::dtype_code::Float);
    auto* data = new char[std::max<size_t>(table.rows * table.width * bytes, 1)];
    nb::capsule owner(data, [](void* held) noexcept { delete[] static_cast<char*>(held); });
    const nb::dlpack::dtype type{code, static_cast<uint8_t>(8 * bytes), 1};
    nb::ndarray<nb::numpy> array(data, table.width == 1 ? 1 : 2, shape, owner, nullptr, type);
    out[table.name.c_str()] = nb::cast(array);
    return data;
  });
  return out;
}

using Cube = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
template <size_t dimensions>
using Floats = nb::ndarray<float, nb::ndim<dimensions>, nb::c_contig, nb::device::cpu>;

template <class Array>
void same_shape(const Array& found, std::initializer_list<size_t> expected, const char* name) {
  size_t axis = 0;
  for (const size_t size : expected) same_length(found.shape(axis++), size, name);
}

void add_layer(Decoder& decoder, Column<float> input_norm, Table<float> query, Table<float> key, Table<float> value,
               Column<float> query_norm, Column<float> key_norm, Table<float> out, Column<float> post_norm,
               Table<float> gate, Table<float> up, Table<float> down) {
  const auto& shape = decoder.shape();
  const size_t queries = shape.heads * shape.head_dim, keys = shape.kv_heads * shape.head_dim;
  same_shape(input_norm, {shape.hidden}, "input_norm");
  same_shape(query, {queries, shape.hidden}, "query");
  same_shape(key, {keys, shape.hidden}, "key");
  same_shape(value, {keys, shape.hidden}, "value");
  same_shape(query_norm, {shape.head_dim}, "query_norm");
  same_shape(key_norm, {shape.head_dim}, "key_norm");
  same_shape(out, {shape.hidden, queries}, "out");
  same_shape(post_norm, {shape.hidden}, "post_norm");
  same_shape(gate, {shape.intermediate, shape.hidden}, "gate");
  same_shape(up, {shape.intermediate, shape.hidden}, "up");
  same_shape(down, {shape.hidden, shape.intermediate}, "down");
  nb::gil_scoped_release release;
  decoder.add_layer({input_norm.data(), query.data(), key.data(), value.data(), query_norm.data(), key_norm.data(),
                     out.data(), post_norm.data(), gate.data(), up.data(), down.data()});
}

void sum_rows_of(Table<float> table, Table<int64_t> place, int64_t none, Floats<2> out) {
  same_shape(out, {place.shape(0), table.shape(1)}, "out");
  const int64_t* end = place.data() + place.size();
  if (std::any_of(place.data(), end, [&](int64_t k) { return k < 0 || k >= static_cast<int64_t>(table.shape(0)); }))
    throw ShardError("places: found one outside 0.." + std::to_string(table.shape(0)));
  nb::gil_scoped_release release;
  sum_rows(table.data(), table.shape(1), place.data(), place.shape(0), place.shape(1), none, out.data());
}

const DecoderShape& of_layer(const Decoder& decoder, size_t layer) {
  if (layer >= decoder.layers()) throw ShardError("layer: found " + std::to_string(layer) + ", which is not there");
  return decoder.shape();
}

void project_rows(const Decoder& decoder, size_t layer, Table<float> hidden, Table<float> cos, Table<float> sin,
                  Floats<3> query, Floats<3> key, Floats<3> value, unsigned threads) {
  const auto& shape = of_layer(decoder, layer);
  const size_t rows = hidden.shape(0);
  same_shape(hidden, {rows, shape.hidden}, "hidden");
  same_shape(cos, {rows, shape.head_dim / 2}, "cos");
  same_shape(sin, {rows, shape.head_dim / 2}, "sin");
  same_shape(query, {rows, shape.heads, shape.head_dim}, "query");
  same_shape(key, {rows, shape.kv_heads, shape.head_dim}, "key");
  same_shape(value, {rows, shape.kv_heads, shape.head_dim}, "value");
  nb::gil_scoped_release release;
  decoder.project(layer, rows, hidden.data(), cos.data(), sin.data(), query.data(), key.data(), value.data(), threads);
}

void attend(const Decoder& decoder, Cube query, Cube key, Cube value, Column<int32_t> offsets, Column<int64_t> prompt,
            Column<int32_t> prefix, Cube own_key, Cube own_value, Floats<3> out, unsigned threads) {
  const auto& shape = decoder.shape();
  const size_t rows = query.shape(0), completions = prompt.size(), own_rows = own_key.shape(0);
  same_length(prefix.size(), completions, "prefix");
  if (completions == 0 || rows % completions || own_rows % completions || (own_rows && own_rows < rows))
    throw ShardError("completions: found " + std::to_string(completions) + " of " + std::to_string(rows) + " rows");
  for (const auto* rows_of : {&query, &key, &value, &own_key, &own_value}) same_length(rows_of->shape(2), shape.head_dim, "head");
  for (const auto* keys : {&key, &value, &own_key, &own_value}) same_length(keys->shape(1), shape.kv_heads, "kv heads");
  same_shape(query, {rows, shape.heads}, "query");
  same_shape(out, {rows, shape.heads, shape.head_dim}, "out");
  same_shape(value, {key.shape(0)}, "value");
  same_shape(own_value, {own_rows}, "own_value");
  const auto starts = view(offsets);
  int64_t before = 0;
  for (size_t c = 0; c < completions; ++c) {
    const int64_t of = prompt.data()[c], seen = prefix.data()[c];
    if (of < before || of + 1 >= static_cast<int64_t>(starts.size()) || starts[of] < 0 || seen < 0 ||
        starts[of] + seen > starts[of + 1] || starts[of + 1] > static_cast<int64_t>(key.shape(0)) ||
        (seen == 0 && own_rows == 0))
      throw ShardError("completion " + std::to_string(c) + ": found " + std::to_string(seen) + " tokens of prompt " +
                       std::to_string(of) + ", which are not there");
    before = of;
  }
  nb::gil_scoped_release release;
  decoder.attend({query.data(), key.data(), value.data(), starts, view(prompt), view(prefix), own_key.data(),
                  own_value.data(), own_rows / completions, rows / completions},
                 out.data(), threads);
}

void finish_rows(const Decoder& decoder, size_t layer, Cube attention, Floats<2> hidden, unsigned threads) {
  const auto& shape = of_layer(decoder, layer);
  const size_t rows = hidden.shape(0);
  same_shape(hidden, {rows, shape.hidden}, "hidden");
  same_shape(attention, {rows, shape.heads, shape.head_dim}, "attention");
  nb::gil_scoped_release release;
  decoder.finish(layer, rows, attention.data(), hidden.data(), threads);
}

void norm_rows(const Decoder& decoder, Column<float> weight, Floats<2> hidden) {
  same_shape(weight, {decoder.shape().hidden}, "weight");
  same_shape(hidden, {hidden.shape(0), decoder.shape().hidden}, "hidden");
  nb::gil_scoped_release release;
  decoder.norm(hidden.shape(0), weight.data(), hidden.data());
}

std::unique_ptr<Verdict> make_verdict(Table<float> edges, Table<float> first, Column<float> first_bias, Cube second,
                                      Table<float> second_bias, Table<float> last, Column<float> wide, float wide_bias) {
  constexpr size_t kUnits = kMembers * kWidth;
  const size_t features = edges.shape(0), encoded = features * edges.shape(1);
  if (edges.shape(1) < 2) throw ShardError("edges: expected at least 2 of a feature");
  same_shape(first, {kUnits, encoded}, "first");
  same_shape(first_bias, {kUnits}, "first_bias");
  same_shape(second, {kMembers, kWidth, kWidth}, "second");
  same_shape(second_bias, {kMembers, kWidth}, "second_bias");
  same_shape(last, {kMembers, kWidth}, "last");
  same_shape(wide, {encoded}, "wide");
  return std::make_unique<Verdict>(features, edges.shape(1) - 1, edges.data(), first.data(), first_bias.data(),
                                   second.data(), second_bias.data(), last.data(), wide.data(), wide_bias);
}

void verdict_logits(const Verdict& verdict, Table<float> features, Output<float> out, unsigned threads) {
  same_shape(features, {out.size(), verdict.features()}, "features");
  nb::gil_scoped_release release;
  verdict.logits(out.size(), features.data(), out.data(), threads);
}

std::unique_ptr<Trees> make_trees(Table<int32_t> feature, Table<float> threshold, Table<bool> unknown_right,
                                  Table<int32_t> left_leaves, Table<float> value) {
  const size_t trees = feature.shape(0), splits = feature.shape(1);
  if (splits >= Trees::kMostLeaves) throw ShardError("feature: found more splits than a tree may have");
  same_shape(threshold, {trees, splits}, "threshold");
  same_shape(unknown_right, {trees, splits}, "unknown_right");
  same_shape(left_leaves, {trees, splits}, "left_leaves");
  same_shape(value, {trees, splits + 1}, "value");
  for (size_t k = 0; k < trees * splits; ++k) {
    if (feature.data()[k] < 0) throw ShardError("feature: found a negative one");
    if (left_leaves.data()[k] < 0 || left_leaves.data()[k] >> splits)
      throw ShardError("left_leaves: found a split with all leaves on its left");
  }
  return std::make_unique<Trees>(trees, splits, feature.data(), threshold.data(), unknown_right.data(),
                                 left_leaves.data(), value.data());
}

void tree_logits(const Trees& trees, Table<float> features, Output<float> out, unsigned threads) {
  same_shape(features, {out.size()}, "features");
  if (features.shape(1) < trees.features()) throw ShardError("features: found fewer than the trees ask for");
  nb::gil_scoped_release release;
  trees.logits(out.size(), features.shape(1), features.data(), out.data(), threads);
}

void add_events(SortingSource& source, Column<int32_t> user, Column<int32_t> item, Column<uint8_t> feedback,
                Column<int64_t> time) {
  same_length(item.size(), user.size(), "item");
  same_length(feedback.size(), user.size(), "feedback");
  same_length(time.size(), user.size(), "time");
  nb::gil_scoped_release release;
  source.add(view(user), item.data(), feedback.data(), time.data());
}

void write_sorted(SortingSource& source, const std::string& path, uint64_t users, uint64_t items, uint32_t time_unit,
                  unsigned threads) {
  nb::gil_scoped_release release;
  source.finish();
  write_shard(path, source, {users, items, time_unit, threads, {}});
}

void shard_offsets(const Shard& shard, Column<int32_t> users, Output<int64_t> offsets) {
  same_length(offsets.size(), users.size() + 1, "offsets");
  nb::gil_scoped_release release;
  shard.offsets(view(users), offsets.data());
}

void shard_read(const Shard& shard, Column<int32_t> users, Column<int64_t> offsets, Output<int32_t> item,
                Output<uint8_t> feedback, Output<int64_t> time, unsigned threads) {
  same_length(offsets.size(), users.size() + 1, "offsets");
  std::vector<int64_t> expected(users.size() + 1);
  nb::gil_scoped_release release;
  shard.offsets(view(users), expected.data());
  if (!std::equal(expected.begin(), expected.end(), offsets.data())) throw ShardError("offsets: not those of the users");
  const auto events = static_cast<size_t>(expected.back());
  same_length(item.size(), events, "item");
  same_length(feedback.size(), events, "feedback");
  same_length(time.size(), events, "time");
  shard.read(view(users), offsets.data(), item.data(), feedback.data(), time.data(), threads);
}

// `table` and `out` are the bytes of two-dimensional arrays of any element type.
void shard_read_rows(const Shard& shard, Column<int32_t> users, Column<int64_t> offsets, Table<uint8_t> table,
                     Output<uint8_t> out, unsigned threads) {
  same_length(offsets.size(), users.size() + 1, "offsets");
  if (table.shape(0) < shard.items()) same_length(table.shape(0), shard.items(), "table");
  std::vector<int64_t> expected(users.size() + 1);
  nb::gil_scoped_release release;
  shard.offsets(view(users), expected.data());
  if (!std::equal(expected.begin(), expected.end(), offsets.data())) throw ShardError("offsets: not those of the users");
  same_length(out.size(), static_cast<size_t>(expected.back()) * table.shape(1), "out");
  shard.read_rows(view(users), offsets.data(), table.data(), table.shape(1), out.data(), threads);
}

PackedParts shard_pack(const Shard& shard, Column<int32_t> users, Column<int64_t> first, Column<uint8_t> views,
                       Column<int32_t> branch_history, Column<int64_t> moments, Table<int32_t> item_nodes,
                       unsigned threads) {
  same_length(first.size(), users.size(), "first");
  same_length(views.size(), users.size(), "views");
  same_length(moments.size(), branch_history.size(), "moments");
  const PackHistories histories{view(users), first.data(), views.data()};
  const PackBranches branches{view(branch_history), moments.data()};
  const ItemNodes nodes{item_nodes.data(), item_nodes.shape(0), static_cast<int>(item_nodes.shape(1))};
  nb::gil_scoped_release release;
  return pack(shard, histories, branches, nodes, threads);
}

void write_packed(const PackedParts& parts, Output<int32_t> item, Output<uint8_t> feedback, Output<uint8_t> gap,
                  Output<int32_t> cu_seqlens, Output<int32_t> prefix, Output<uint8_t> branch_gap,
                  Output<int32_t> seen_item, Output<int32_t> seen_cu, std::vector<Output<int32_t>> node,
                  std::vector<Output<int32_t>> request, std::vector<Output<int32_t>> count,
                  std::vector<Output<int32_t>> slot, unsigned threads) {
  auto room = [](const auto& array) { return std::span(array.data(), array.size()); };
  PackedRoom all{room(item),   room(feedback),   room(gap),       room(cu_seqlens),
                 room(prefix), room(branch_gap), room(seen_item), room(seen_cu),    {}};
  for (const auto* arrays : {&node, &request, &count, &slot})
    same_length(arrays->size(), parts.nodes().size(), "levels");
  for (size_t level = 0; level < node.size(); ++level)
    all.seen.push_back({room(node[level]), room(request[level]), room(count[level]), room(slot[level])});
  nb::gil_scoped_release release;
  parts.write(all, threads);
}

// What every file of a shard holds, in bytes a part.
nb::list shard_files(const Shard& shard) {
  nb::list files;
  for (const auto& file : shard.files()) {
    const Header& h = file->header();
    uint64_t item_bytes = 0, time_bytes = 0;
    for (uint64_t b = 0; b < file->blocks(); ++b) {
      item_bytes += file->block_bytes(b, false);
      time_bytes += file->block_bytes(b, true);
    }
    nb::dict facts;
    facts["path"] = file->path();
    facts["version"] = h.version;
    facts["rows"] = h.rows;
    facts["users"] = h.users;
    facts["items"] = h.items;
    facts["items_with_events"] = h.ranked;
    facts["events"] = h.events;
    facts["time_unit"] = h.time_unit;
    facts["time_coding"] = h.features & kTimeRuns ? "runs" : "deltas";
    nb::dict bytes;
    bytes["items"] = item_bytes;
    bytes["times"] = time_bytes;
    bytes["index"] = h.index.size + h.wide.size + h.user_list.size;
    bytes["tables"] = sizeof(Header) + h.codes.size + h.ranks.size;
    facts["bytes"] = bytes;
    facts["file_bytes"] = h.file_size;
    facts["checksum"] = h.crc;  // over the header, which holds the checksums of all tables
    files.append(facts);
  }
  return files;
}

}  // namespace
}  // namespace negfast

NB_MODULE(_core, m) {
  using namespace negfast;
  m.doc() = "negfast's C++ core: shard writer, reader and packer, features";
  const nb::object input_error = nb::module_::import_("negfast.errors").attr("InputError");
  nb::exception<ShardError>(m, "ShardError", input_error);
  nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
    try {
      std::rethrow_exception(thrown);
    } catch (const std::system_error& error) {  // of files: no space, no permission
      nb::object found = nb::make_tuple(error.code().value(), error.what());
      PyErr_SetObject(PyExc_OSError, found.ptr());
    }
  });

  m.attr("START") = kStart;
  m.attr("GAPS") = kGaps;
  m.def("write_histories", &write_histories, "path"_a, "offsets"_a, "item"_a, "feedback"_a, "time"_a, "user_list"_a,
        "users"_a, "items"_a, "time_unit"_a, "threads"_a);

  m.def("request_days", &request_days_of, "offsets"_a, "item"_a, "feedback"_a, "time"_a, "horizon"_a, "user"_a, "day"_a,
        "ahead"_a);

  m.attr("FEATURE_TEXT") = kText;
  nb::dict constants;
  for (const auto& [name, value] : feature_constants()) constants[name.c_str()] = value;
  m.attr("FEATURE_CONSTANTS") = constants;
  nb::class_<Features>(m, "Features")
      .def(nb::new_(&make_features), "by_day"_a, "prior_rate"_a, "prior_value"_a, "has_values"_a, "attributes"_a)
      .def_prop_ro("width", &Features::width)
      .def_prop_ro("n_users", &Features::users)
      .def_prop_ro("n_items", &Features::items)
      .def_prop_ro("n_bytes", &Features::bytes)
      .def("add_users", [](Features& features, Column<uint64_t> key) { features.add_users(view(key)); }, "key"_a)
      .def("add_values", &add_values, "column"_a, "content"_a)
      .def("add_items", &add_items, "key"_a, "text"_a, "cell"_a, "value_start"_a, "value"_a)
      .def("replay", &replay_features, "user"_a, "item"_a, "time"_a, "feedback"_a, "value"_a, "asked_user"_a,
           "asked_item"_a, "moment"_a, "out"_a)
      .def("add", &Features::add, "user"_a, "item"_a, "time"_a, "feedback"_a,
           "value"_a = std::numeric_limits<float>::quiet_NaN())
      .def("answer", &answer_features, "user"_a, "items"_a, "moment"_a)
      .def("tables", &feature_tables);

  m.attr("HAS_BFLOAT16") = has_bfloat16();
  m.attr("VERDICT_MEMBERS") = kMembers;
  m.attr("VERDICT_WIDTH") = kWidth;
  m.def("sum_rows", &sum_rows_of, "table"_a, "place"_a, "none"_a, "out"_a);
  nb::class_<Decoder>(m, "Decoder")
      .def("__init__",
           [](Decoder* to, size_t hidden, size_t heads, size_t kv_heads, size_t head_dim, size_t intermediate, float eps,
              bool bfloat16) {
             if (bfloat16 && !has_bfloat16()) throw ShardError("bfloat16: this CPU does not multiply it");
             if (!hidden || !kv_heads || heads % kv_heads || !heads || !head_dim || head_dim % 2 || !intermediate)
               throw ShardError("decoder: found sizes that do not fit together");
             new (to) Decoder({hidden, heads, kv_heads, head_dim, intermediate, eps}, bfloat16);
           },
           "hidden"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "intermediate"_a, "eps"_a, "bfloat16"_a)
      .def("add_layer", &add_layer, "input_norm"_a, "query"_a, "key"_a, "value"_a, "query_norm"_a, "key_norm"_a, "out"_a,
           "post_norm"_a, "gate"_a, "up"_a, "down"_a)
      .def("project", &project_rows, "layer"_a, "hidden"_a, "cos"_a, "sin"_a, "query"_a, "key"_a, "value"_a, "threads"_a)
      .def("attend", &attend, "query"_a, "key"_a, "value"_a, "offsets"_a, "prompt"_a, "prefix"_a, "own_key"_a,
           "own_value"_a, "out"_a, "threads"_a)
      .def("finish", &finish_rows, "layer"_a, "attention"_a, "hidden"_a, "threads"_a)
      .def("norm", &norm_rows, "weight"_a, "hidden"_a);
  nb::class_<Verdict>(m, "Verdict")
      .def(nb::new_(&make_verdict), "edges"_a, "first"_a, "first_bias"_a, "second"_a, "second_bias"_a, "last"_a,
           "wide"_a, "wide_bias"_a)
      .def("logits", &verdict_logits, "features"_a, "out"_a, "threads"_a);

  nb::class_<Trees>(m, "Trees")
      .def(nb::new_(&make_trees), "feature"_a, "threshold"_a, "unknown_right"_a, "left_leaves"_a, "value"_a)
      .def("logits", &tree_logits, "features"_a, "out"_a, "threads"_a);

  nb::class_<SortingSource>(m, "EventSorter")
      .def(nb::init<std::string, uint64_t, uint64_t, uint64_t>(), "folder"_a, "users"_a, "items"_a, "memory_bytes"_a)
      .def("add", &add_events, "user"_a, "item"_a, "feedback"_a, "time"_a)
      .def("write", &write_sorted, "path"_a, "users"_a, "items"_a, "time_unit"_a, "threads"_a);

  nb::class_<PackedParts>(m, "PackedParts")
      .def_prop_ro("histories", &PackedParts::histories)
      .def_prop_ro("positions", &PackedParts::positions)
      .def_prop_ro("branches", &PackedParts::branches)
      .def_prop_ro("seen", &PackedParts::seen)
      .def_prop_ro("nodes", &PackedParts::nodes)
      .def("write", &write_packed, "item"_a, "feedback"_a, "gap"_a, "cu_seqlens"_a, "prefix"_a, "branch_gap"_a,
           "seen_item"_a, "seen_cu"_a, "seen_node"_a, "seen_request"_a, "seen_count"_a, "seen_slot"_a, "threads"_a);

  nb::class_<Shard>(m, "Shard")
      .def(nb::init<const std::vector<std::string>&>(), "paths"_a, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("n_users", &Shard::users)
      .def_prop_ro("n_items", &Shard::items)
      .def_prop_ro("n_events", &Shard::events)
      .def("files", &shard_files)
      .def("offsets", &shard_offsets, "users"_a, "out"_a)
      .def("read", &shard_read, "users"_a, "offsets"_a, "item"_a, "feedback"_a, "time"_a, "threads"_a)
      .def("read_rows", &shard_read_rows, "users"_a, "offsets"_a, "table"_a, "out"_a, "threads"_a)
      .def("pack", &shard_pack, nb::kw_only(), "users"_a, "first"_a, "views"_a, "branch_history"_a, "moments"_a,
           "item_nodes"_a, "threads"_a);
}
