#include "grammar/compiler/schema_check.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace fathom {
namespace {

using testing::HasSubstr;

std::string MessageOf(std::string_view schema) {
  const absl::Status status = CheckSchema(schema);
  EXPECT_TRUE(status.ok() || absl::IsInvalidArgument(status)) << status;
  return std::string(status.message());
}

TEST(SchemaCheckTest, AcceptsWhatToolsAreDescribedWith) {
  for (const char* schema : {
           "true",
           "{}",
           R"({"type": "object"})",
           R"({"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "T",
               "type": "object", "properties": {"a": {"type": "string", "format": "date"},
               "b": {"type": ["integer", "null"], "minimum": 0, "x-own": 1}}, "required": ["a"]})",
           R"({"anyOf": [{"type": "string"}, {"type": "null"}], "default": null, "title": "T"})",
           R"({"$ref": "#/$defs/a~1b", "description": "d", "$defs": {"a/b": {"const": 1}}})",
           R"({"type": "array", "items": {"$ref": "#"}, "maxItems": 3, "uniqueItems": false})",
           R"({"type": "string", "enum": ["a", "b"]})",
           R"({"enum": [1, 2.0, -3], "type": "integer"})",
           R"({"enum": [1, "a", null], "type": ["integer", "string", "null"]})",
           R"({"type": "string", "minimum": 3})",  // it is not about strings
           R"({"type": "number", "minimum": 1e300})",
           R"({"type": "object", "properties": {"é": {}}, "additionalProperties": false})",
           R"({"type": "object", "minProperties": 2, "properties": {"a": {}, "b": {}}})",
           R"({"type": "object", "minProperties": 1, "additionalProperties": {}})",
       }) {
    EXPECT_EQ(MessageOf(schema), "") << schema;
  }
}

TEST(SchemaCheckTest, RefusesWhatWouldBeLeftOutByNameAndPlace) {
  struct Case {
    const char* schema;
    const char* message;
  };
  for (const Case& c : {
           Case{R"({"not": {}})", "schema at #: not is not supported"},
           Case{R"({"type": "object", "properties": {"a": {"if": true}}})",
                "schema at #/properties/a: if is not supported"},
           Case{R"({"type": "array", "uniqueItems": true})", "uniqueItems is not supported"},
           Case{R"({"type": "array", "contains": {}})", "contains is not supported"},
           Case{R"({"anyOf": [{}], "type": "object"})", "'type' beside 'anyOf' is not supported"},
           Case{R"({"$ref": "#/$defs/a", "minimum": 1, "$defs": {"a": {}}})",
                "'minimum' beside '$ref' is not supported"},
           Case{R"({"enum": ["a"], "type": "integer"})", "a value of enum is not of the type"},
           Case{R"({"minimum": 1})", "'minimum' is supported only beside a 'type'"},
           Case{R"({"required": ["a"]})", "'required' is supported only beside a 'type'"},
           Case{R"({"type": "object", "required": ["a"]})", "not one of the properties"},
           Case{R"({"type": "object", "properties": {"a": {}}, "patternProperties": {"b": {}}})",
                "'patternProperties' beside 'properties' is not supported"},
           Case{R"({"type": "object", "patternProperties": {"a": {}, "b": {}}})",
                "more than one pattern in patternProperties is not supported"},
           Case{R"({"type": "object", "properties": {"a": {}}, "propertyNames": {"maxLength": 2,
                    "type": "string"}})",
                "'propertyNames' beside 'properties' is not supported"},
           Case{R"({"type": "object", "properties": {"a\"b": {}}, "additionalProperties": {}})",
                "a property whose name is not plain ASCII ('a\"b') beside 'additionalProperties'"},
           Case{R"({"type": "object", "properties": {"é": {}}, "unevaluatedProperties": true})",
                "('é') beside 'additionalProperties' is not supported"},
           Case{R"({"type": "object", "minProperties": 2, "additionalProperties": {}})",
                "minProperties above 1 where names are free is not supported"},
           Case{R"({"$ref": "https://example.com/schema"})", "names no schema in here"},
           Case{R"({"$ref": "#/properties/b"})", "names no schema in here"},
           Case{R"({"type": "string", "type": "null"})", "'type' is there twice"},
           Case{R"({"properties": {"a": {"$id": "x"}}})", "$id is not supported"},
           Case{R"({"properties": []})", "expected an object"},
           Case{R"({"type": 3})", "type must be"},
           Case{R"({"type": "text"})", "schema at #: 'text' is no type, expected string"},
           Case{R"({"type": "string", "minLength": -1})",
                "schema at #: minLength must be a whole number of at least 0, got -1"},
           Case{R"({"type": "string", "maxLength": 1.5})", "at least 0, got 1.5"},
           Case{R"({"type": "string", "minLength": 4294967296})", "must be at most 2147483647"},
           Case{R"({"type": "array", "minItems": 3, "maxItems": 2})",
                "minItems 3 is above maxItems 2"},
           Case{R"({"type": "object", "maxProperties": "2"})", "at least 0, got \"2\""},
           Case{R"({"type": "number", "minimum": "1"})", "minimum must be a number"},
           Case{R"({"type": "number", "minimum": 3, "maximum": 1})",
                "minimum 3 is above maximum 1"},
           Case{R"({"type": "integer", "maximum": -1e300})",
                "maximum of integers must be within 64 bits, got -1e+300"},
           Case{R"({"type": "integer", "multipleOf": 0})", "multipleOf must be above 0, got 0"},
           Case{R"({"type": "string", "pattern": 3})", "pattern must be a string"},
           Case{R"({"type": "string", "format": 3})", "format must be a string"},
           Case{R"({"type": "string", "pattern": "é."})", "the pattern 'é.' has characters"},
           Case{R"([])", "expected an object"},
           Case{R"({"type": )", "not valid JSON"},
           Case{"", "not valid JSON"},
           Case{"{\"title\": \"\xff\"}", "not valid JSON"},
       }) {
    EXPECT_THAT(MessageOf(c.schema), HasSubstr(c.message)) << c.schema;
  }
}

// xgrammar's CVE-2025-57809: recursed until the stack was full.
TEST(SchemaCheckTest, RefusesReferencesThatGoRound) {
  EXPECT_THAT(MessageOf(R"({"$ref": "#"})"), HasSubstr("circle"));
  EXPECT_THAT(MessageOf(R"({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}})"),
              HasSubstr("circle"));
  EXPECT_THAT(MessageOf(R"({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}})"),
              HasSubstr("circle"));
}

// CVE-2025-58446: a large enum took minutes.
TEST(SchemaCheckTest, LimitsTheValuesOfAnEnum) {
  std::string values = "0";
  for (size_t i = 1; i < kMaxEnumValues; ++i) absl::StrAppend(&values, ",", i);
  EXPECT_EQ(MessageOf(absl::StrCat("{\"enum\": [", values, "]}")), "");
  EXPECT_THAT(MessageOf(absl::StrCat("{\"enum\": [", values, ", -1]}")), HasSubstr("limit 2048"));
}

// CVE-2026-25048: deep nesting ended the process.
TEST(SchemaCheckTest, LimitsDepth) {
  const auto nested = [](size_t depth) {
    std::string schema = "{}";
    for (size_t i = 1; i < depth; ++i) schema = absl::StrCat("{\"items\":", schema, "}");
    return schema;
  };
  EXPECT_EQ(MessageOf(nested(kMaxSchemaDepth - 1)), "");
  EXPECT_THAT(MessageOf(nested(kMaxSchemaDepth + 1)), HasSubstr("nests deeper than 64"));
  EXPECT_THAT(MessageOf(nested(5000)), HasSubstr("nests deeper than 64"));
}

}  // namespace
}  // namespace fathom
