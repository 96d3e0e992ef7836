// Words, numbers and operands of PTX text.
#pragma once

#include "program.h"

#include <cctype>

namespace lfx::ptx
{

class Scanner
{
public:
    explicit Scanner(std::string const& text)
        : mText(text)
    {
    }

    [[noreturn]] void fail(std::string const& reason) const
    {
        throw Error("PTX line " + std::to_string(line()) + ": " + reason + " at \"" + mText.substr(mAt, 40) + "\"");
    }

    // The line of the current position. Positions only grow, so each line is counted once.
    int32_t line() const
    {
        for (; mCounted < mAt; ++mCounted)
        {
            mLine += mText[mCounted] == '\n' ? 1 : 0;
        }
        return mLine;
    }

    size_t position() const
    {
        return mAt;
    }

    std::string textFrom(size_t begin) const
    {
        return mText.substr(begin, mAt - begin);
    }

    // Skips blanks and comments.
    void skip()
    {
        while (mAt < mText.size())
        {
            if (std::isspace(static_cast<unsigned char>(mText[mAt])) != 0)
            {
                ++mAt;
            }
            else if (mText.compare(mAt, 2, "//") == 0)
            {
                mAt = std::min(mText.find('\n', mAt), mText.size());
            }
            else if (mText.compare(mAt, 2, "/*") == 0)
            {
                mAt = std::min(mText.find("*/", mAt), mText.size() - 2) + 2;
            }
            else
            {
                return;
            }
        }
    }

    bool atEnd()
    {
        skip();
        return mAt == mText.size();
    }

    char peek()
    {
        skip();
        return mAt < mText.size() ? mText[mAt] : '\0';
    }

    bool accept(char expected)
    {
        bool const found = peek() == expected;
        mAt += found ? 1 : 0;
        return found;
    }

    void expect(char expected)
    {
        if (!accept(expected))
        {
            fail(std::string("expected '") + expected + "'");
        }
    }

    // A name, an opcode or a directive; may be empty.
    std::string word(char const* punctuation = "_$%.")
    {
        skip();
        size_t const begin = mAt;
        while (mAt < mText.size()
            && (std::isalnum(static_cast<unsigned char>(mText[mAt])) != 0
                || std::string(punctuation).find(mText[mAt]) != std::string::npos))
        {
            ++mAt;
        }
        return textFrom(begin);
    }

    // Whether a label's colon follows; the double colon of an opcode's modifier does not count.
    bool acceptColon()
    {
        bool const found = peek() == ':' && mText.compare(mAt, 2, "::") != 0;
        mAt += found ? 1 : 0;
        return found;
    }

    size_t size()
    {
        return static_cast<size_t>(number().value);
    }

    Operand number()
    {
        bool const negative = accept('-');
        std::string digits = word("");
        Operand result;
        result.kind = Operand::Kind::kINTEGER;
        if (digits.empty())
        {
            fail("expected a number");
        }
        if (digits.size() == 10 && (digits.compare(0, 2, "0f") == 0 || digits.compare(0, 2, "0F") == 0))
        {
            result.kind = Operand::Kind::kFLOAT;
            result.value = std::stoull(digits.substr(2), nullptr, 16);
            return result;
        }
        size_t used = 0;
        result.value = std::stoull(digits, &used, 0);
        if (used + (digits.back() == 'U' ? 1 : 0) != digits.size() || (mAt < mText.size() && mText[mAt] == '.'))
        {
            fail("a number that is not supported");
        }
        result.value = negative ? 0 - result.value : result.value;
        return result;
    }

    Operand operand()
    {
        Operand first = primary();
        if (!accept('|'))
        {
            return first;
        }
        Operand pair;
        pair.kind = Operand::Kind::kPAIR;
        pair.elements = {std::move(first), primary()};
        return pair;
    }

private:
    Operand primary()
    {
        Operand result;
        char const next = peek();
        if (next == '{')
        {
            result.kind = Operand::Kind::kVECTOR;
            expect('{');
            do
            {
                result.elements.push_back(primary());
            } while (accept(','));
            expect('}');
            return result;
        }
        if (accept('['))
        {
            result.kind = Operand::Kind::kADDRESS;
            result.name = word("_$%");
            result.value = accept('+') || peek() == '-' ? number().value : 0;
            expect(']');
            return result;
        }
        if (next == '-' || std::isdigit(static_cast<unsigned char>(next)) != 0)
        {
            return number();
        }
        result.negated = accept('!');
        result.name = word();
        if (result.name.empty())
        {
            fail("expected an operand");
        }
        return result;
    }

    std::string const& mText;
    size_t mAt = 0;
    mutable size_t mCounted = 0;
    mutable int32_t mLine = 1;
};

} // namespace lfx::ptx
